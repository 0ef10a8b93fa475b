"""A disk that is full: an error that says so, nothing lost, nothing half-written; with room again the verb succeeds.

RLIMIT_FSIZE stands for it, which needs no privileges: a write behind that many bytes of a file fails (EFBIG; Python
ignores the signal). The limits lie a twentieth below the sizes of the files that the verb writes: a benchmark's numbers
have more digits in one run than in the next.
"""

import contextlib
import io
import resource
import shutil
from pathlib import Path

import datasets
import pytest
from accelerate.state import AcceleratorState
from tiny_verbs import arguments, write_things

from latent_egc.commands import main

pytestmark = pytest.mark.faults

VERBS = ("encode", "train", "sample", "evaluate", "probe", "export", "convert", "benchmark")


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(folder / "datasets")
    write_things(folder, per_class=30)
    assert call("encode", folder, folder / "cache") == (0, "")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def call(verb: str, things: Path, output: Path, limit: int | None = None) -> tuple[int, str]:
    """Runs a verb whose files may have `limit` bytes; its exit status and its error, if any."""
    AcceleratorState._reset_state(reset_partial_state=True)
    stderr, before = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    command = arguments(verb, things, output) + (["training.max_steps=12"] if verb == "train" else [])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if limit is None else limit, before[1]))
        try:
            status = main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return status, "".join(line for line in stderr.getvalue().splitlines() if line.startswith("error: "))


def files(folder: Path) -> dict[str, bytes]:
    """Path -> content of everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_loses_nothing(verb, things, tmp_path):
    whole = tmp_path / "whole"
    assert call(verb, things, whole) == (0, "")
    expected = files(whole)
    sizes = sorted({len(content) for content in expected.values() if content})
    others = files(things)
    for limit in {0, *(size - 1 - size // 20 for size in (*sizes[:: max(1, len(sizes) // 4)], sizes[-1]))}:
        output = tmp_path / str(limit)
        status, error = call(verb, things, output, limit)
        assert status == 2, limit
        assert "File too large" in error, (limit, error)
        assert files(things) == others
        assert call(verb, things, output) == (0, ""), limit
        assert files(output).keys() == expected.keys()
        shutil.rmtree(output)
