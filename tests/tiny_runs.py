"""Runs of a tiny network, in this process or in one of their own, and what they logged."""

import os
import subprocess
import sys
import time

import yaml
from tiny import ROOT

from latent_egc.config import parse_config
from latent_egc.training.checkpoints import read_metrics


def run_values(folder, **training):
    """A run of a tiny network on the digits, through the packaged autoencoder."""
    return {
        "model": {
            "sample_size": 8,
            "in_channels": 4,
            "num_classes": 10,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "attention_levels": [1],
            "num_attention_heads": 2,
            "norm_num_groups": 4,
        },
        "objective": {"classification_weight": 0.1, "label_smoothing": 0.1},
        "training": {
            "max_steps": 4,
            "train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_schedule": "cosine",
            "warmup_steps": 2,
            "log_every": 1,
            "validate_every": 4,
            "sample_every": 1000,
            "checkpoint_every": 4,
            "num_validation_images": 8,
            "trackers": [],
        }
        | training,
        "sampling": {"num_inference_steps": 2, "num_images_per_label": 1},
        "output_dir": str(folder),
    }


def run_config(folder, **training):
    return parse_config(run_values(folder, **training))


def losses(folder):
    """step -> its losses and gradient norm, as logged."""
    keys = ("loss", "denoising_loss", "classification_loss", "grad_norm")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return {row["step"]: tuple(row[key] for key in keys) for row in rows}


def evaluations(folder):
    """The validation rows, as logged."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "validation_denoising_loss" in row]


def start(config_values, *overrides, launcher=(), environment=None, new_session=False):
    """train.py in a process of its own, one thread each so that sums are in the same order everywhere."""
    folder = config_values["output_dir"]
    config_file = f"{folder}.yaml"
    with open(config_file, "w") as file:
        yaml.safe_dump(config_values, file)
    command = [*(launcher or [sys.executable]), str(ROOT / "train.py"), config_file, *overrides]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (environment or {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": new_session}
    return subprocess.Popen(command, env=environment, **options)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and any(s >= step for s in losses(folder)):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])
