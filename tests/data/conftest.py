"""What the tests of data are given."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` prepares its tables below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
