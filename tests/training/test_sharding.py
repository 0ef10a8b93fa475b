"""Runs with sharded parameters: the same gradients, checkpoints and averages as with whole ones."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import ROOT, tiny_unet
from tiny_runs import evaluations, finish, losses, run_config, run_values, start
from tiny_sharding import gradients_of_two_steps

from latent_egc.config import parse_config
from latent_egc.training.loop import train
from latent_egc.training.run_folder import _compare
from latent_egc.training.sharding import copy_without_weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WEIGHTS, AVERAGES = "state/model.safetensors", "pipeline/energy_model/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "runs",
    [
        ["unet-plain", "unet-recomputed", "unet-stale", "transformer-plain", "transformer-bf16"],
        pytest.param(["transformer-compiled"], marks=pytest.mark.full_compiler),
    ],
)
def test_gradients_of_sharded_parameters_are_those_of_whole_ones_step_after_step(tmp_path, runs):
    """Against plain float64 on one process; and the second step's would show weights that stayed those of the first."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    script = str(ROOT / "tests" / "tiny_sharding.py")
    subprocess.run([*TORCHRUN, script, str(tmp_path / "gradients.pt"), *runs], env=environment, check=True)
    for name, found in torch.load(tmp_path / "gradients.pt").items():
        expected = gradients_of_two_steps(*name.split("-"))
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        if "bf16" in name:
            assert errors.min() > 1e-4, name  # it is at work
            assert errors.max() < 0.1, name
        else:
            assert errors[0] <= 1e-5, name
            assert errors[1] > 0.01 if "stale" in name else errors[1] <= 1e-5, name


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def test_a_sharded_run_resumes_to_the_bit_and_in_one_process(tmp_path):
    """With accumulated and clipped gradients, averages, validation, and a grid of samples."""
    options = {"checkpoint_every": 2, "sample_every": 4, "lr_schedule": "constant", "max_grad_norm": 0.04}
    batches = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    sharded = run_values(tmp_path / "two", shard="parameters", **batches, **options)
    finish(start(sharded, launcher=TORCHRUN))
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    for folder in (one, resumed):
        shutil.copytree(two, folder)
        shutil.rmtree(checkpoint(folder, 4))
    finish(start(sharded | {"output_dir": str(resumed)}, "training.resume=auto", launcher=TORCHRUN))
    for name in (WEIGHTS, AVERAGES):
        expected, found = (load_file(checkpoint(run, 4) / name) for run in (two, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    expected, found = (torch.load(checkpoint(run, 4) / "state/optimizer.bin")["state"] for run in (two, resumed))
    assert all(torch.equal(found[i][key], expected[i][key]) for i in expected for key in expected[i])
    assert losses(resumed) == losses(two)
    assert evaluations(resumed) == evaluations(two)

    # The checkpoint goes on in one process, and the run is the one that never was sharded.
    train(run_config(one, train_batch_size=8, shard="parameters", resume="auto", **options))
    train(run_config(tmp_path / "whole", train_batch_size=8, **options))
    for run in (one, two):
        for name in (WEIGHTS, AVERAGES):
            expected, found = (load_file(checkpoint(folder, 4) / name) for folder in (tmp_path / "whole", run))
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)
        for step, values in losses(tmp_path / "whole").items():
            assert losses(run)[step] == pytest.approx(values, rel=1e-4), step
        for row, other in zip(evaluations(tmp_path / "whole"), evaluations(run), strict=True):
            assert row == pytest.approx(other, rel=1e-3)
    assert (two / "samples" / "step-00000004.png").is_file()


def test_a_run_from_when_the_key_was_a_boolean_is_the_same_run(tmp_path, recwarn):
    config = run_config(tmp_path, shard="optimizer")
    values = config.to_dict()
    del values["training"]["shard"]
    values["training"]["shard_optimizer"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    _compare(tmp_path, config)
    assert not recwarn.list  # its user did not write that file
    with pytest.warns(UserWarning, match=r"training\.shard_optimizer is now training\.shard"):
        assert parse_config(values).training.shard == "optimizer"


def test_a_copy_without_weights_holds_none():
    model = tiny_unet()
    copied = copy_without_weights(model)
    assert copied.num_parameters() == 0
    assert model.num_parameters() > 0
    assert not copied.training
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]
