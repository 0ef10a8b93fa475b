"""What is run as a file still finds what it imports."""

import runpy

import pytest
from tiny import ROOT

SCRIPTS = sorted(path for folder in ("examples", "experiments") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_imported(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))  # as python does where it runs one
    runpy.run_path(str(script), run_name="imported")
