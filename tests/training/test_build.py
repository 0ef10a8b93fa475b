"""From a configuration to the parts of a run."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import TINY_BACKBONES
from tiny_runs import run_values

from latent_egc import EGCPipeline
from latent_egc.config import ConfigError, SamplingConfig, parse_config
from latent_egc.training.build import build_pipeline, resolve
from latent_egc.training.loop import train


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"in_channels": 3}, r"model\.in_channels must be 4"),
        ("model", {"sample_size": 16}, r"model\.sample_size must be 8"),
        ("model", {"num_classes": 7}, r"model\.num_classes=7"),
        ("data", {"image_size": 30}, r"data\.image_size must be divisible by the autoencoder's factor 4, got 30"),
    ],
)
def test_misfits_are_found_before_anything_is_written(tmp_path, section, change, message):
    values = run_values(tmp_path / "run")
    values[section] = values.get(section, {}) | change
    with pytest.raises(ConfigError, match=message):
        train(parse_config(values))
    assert not (tmp_path / "run").exists()


def test_the_clean_branch_sees_whole_rows():
    values = {"model": {}, "training": {"train_batch_size": 30}}
    assert resolve(parse_config(values | {"objective": {"clean_fraction": 0.1}})).objective.clean_fraction == 0.1
    with pytest.raises(ConfigError, match=r"objective.clean_fraction must be a whole number of rows .*=30, got 0.25"):
        resolve(parse_config(values | {"objective": {"clean_fraction": 0.25}}))


def test_a_trained_pipeline_samples_in_as_many_steps_as_its_recipe_says_and_keeps_their_number(tmp_path):
    pipeline = build_pipeline(TINY_BACKBONES["unet"](), None, ["a", "b", "c"], SamplingConfig(num_inference_steps=7))
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    for loaded in (pipeline, EGCPipeline.from_pretrained(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        loaded(1, output_type="latent", generator=torch.Generator().manual_seed(0))
        assert loaded.num_timesteps == 7
