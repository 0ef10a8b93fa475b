"""What the tests of the experiments are given."""

import importlib

import pytest
from tiny import ROOT


@pytest.fixture
def experiment(monkeypatch):
    """A function: the name of a script -> its module. Scripts import each other, from the folder that they are in."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module
