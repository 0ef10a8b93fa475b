"""kill -9 at a random moment: called again, a verb ends in the same bits as if it had never been killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_verbs import arguments, write_things

from latent_egc.training.checkpoints import read_metrics

pytestmark = pytest.mark.faults

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
VERBS = ("encode", "train", "train on two processes", "evaluate", "probe", "sample on two processes")
KILLS = [
    pytest.param(verb, number, marks=pytest.mark.xdist_group(verb), id=f"{verb}-{number}")
    for verb in VERBS
    for number in range(6)
]


def launch(verb: str, things: Path, output: Path) -> subprocess.Popen:
    """The verb in processes of its own."""
    command = [*arguments(verb.split()[0], things, output)]
    if verb == "train on two processes":  # from pixels, with loader workers
        command[1:] = [str(things / "pixels.yaml"), f"output_dir={output}", "data.num_workers=1"]
        command += ["training.train_batch_size=2", "training.max_steps=30"]
    if verb == "sample on two processes":  # each image alone, as batches round differently
        command += ["--num-images=200", "--npz", "--batch-size=1"]
        command.remove("--num-images-per-label=1")
    command = [sys.executable, *(TORCHRUN if "two" in verb else []), "-m", "latent_egc", *command]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(things / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_it_writes(process: subprocess.Popen, output: Path) -> None:
    """Returns when there is a file below `output`, or the process has ended."""
    while process.poll() is None and not (output.is_dir() and any(output.iterdir())):
        time.sleep(0.005)


def kill(process: subprocess.Popen) -> None:
    """The whole tree, as when a machine dies; the processes of a launcher are not in its process group."""
    root = psutil.Process(process.pid)
    for one in [root, *root.children(recursive=True)]:
        one.kill()
    process.communicate()


def finish(process: subprocess.Popen) -> None:
    """Waits for a good end."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def outcome(verb: str, output: Path) -> dict:
    """What a verb has found, without times and random names."""
    leftovers = [path for path in output.rglob("*") if path.suffix in (".tmp", ".old") or "unfinished" in path.name]
    assert not leftovers
    if verb == "encode":
        kept = [*output.rglob("*.arrow"), output / "cache.json"]
        return {str(path.relative_to(output)): path.read_bytes() for path in kept}
    if verb.startswith("train"):
        weights = {str(path.relative_to(output)): path.read_bytes() for path in output.glob("pipeline/*/*.safetensors")}
        grids = {path.name: path.read_bytes() for path in output.glob("samples/*.png")}
        rows = read_metrics(output / "metrics.jsonl")
        for row in rows:
            row.pop("seconds_since_last_log", None)
        return weights | grids | {"metrics": rows}
    if verb.startswith("sample"):
        with np.load(output / "samples.npz") as found:
            return {name: array.tobytes() for name, array in found.items()}
    suites = json.loads((output / "report.json").read_text())["suites"]
    return {name: {key: suite[key] for key in ("metrics", "tables", "num_samples")} for name, suite in suites.items()}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things")
    write_things(folder, per_class=300)
    finish(launch("encode", folder, folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(things):
    """A function: verb -> its outcome, and the seconds from the first file to the end; each verb runs once."""
    found = {}

    def run(verb):
        if verb not in found:
            output = things / f"uninterrupted {verb}"
            process = launch(verb, things, output)
            wait_until_it_writes(process, output)
            start = time.monotonic()
            finish(process)
            found[verb] = outcome(verb, output), time.monotonic() - start
        return found[verb]

    return run


@pytest.mark.parametrize(("verb", "number"), KILLS)
def test_a_killed_verb_ends_in_the_same_bits(verb, number, things, uninterrupted, tmp_path):
    expected, seconds = uninterrupted(verb)
    share = random.Random(f"{verb} {number}").random()
    for attempt in range(5):  # on a machine that has become faster the verb may be over too soon
        output = tmp_path / str(attempt)
        process = launch(verb, things, output)
        wait_until_it_writes(process, output)
        time.sleep(share * seconds / 2**attempt)
        if process.poll() is None:
            break
        finish(process)
    else:
        raise AssertionError(f"{verb} was over before it could be killed")
    kill(process)
    finish(launch(verb, things, output))
    assert outcome(verb, output) == expected
