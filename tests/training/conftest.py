"""What the tests of training are given."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process; every run here is its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
