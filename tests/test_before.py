"""What was made before the modules moved into rooms still loads and gives the same numbers.

What was stored (weights, a cache's moments, labels) must come back to the bit. What is computed is equal to the bit on
one kind of processor only, and is compared to 1e-5 here.
"""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from tiny import write_images

from latent_egc import EGCPipeline
from latent_egc.commands.arguments import load_pipeline
from latent_egc.config import load_config
from latent_egc.data.autoencoders import load_autoencoder
from latent_egc.data.latent_cache import CachedViews, open_cache
from latent_egc.training.loop import train
from latent_egc.training.run_folder import load_run_config

BEFORE = Path(__file__).resolve().parent / "data" / "before"
EXPECTED = load_file(BEFORE / "expected.safetensors")


@pytest.fixture(autouse=True)
def folder_of_then(tmp_path, monkeypatch):
    """A working folder with a copy of what was made, and the images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE, "before")
    write_images(Path("images"))


def assert_as_computed(found: torch.Tensor, name: str) -> None:
    """Equal to the number of then, as far as another processor can be."""
    torch.testing.assert_close(found, EXPECTED[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["pipeline", "export", "run"])
def test_pipelines_classify_and_sample_as_before(source):
    pipeline = load_pipeline(f"before/{source}", "cpu")
    assert type(pipeline) is EGCPipeline
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.config.default_num_inference_steps == 50
    name = "exported" if source == "export" else source
    output = pipeline.classify(torch.from_numpy(np.random.default_rng(1).random((2, 3, 8, 8), dtype=np.float32)))
    assert_as_computed(output.logits, f"{name}.logits")
    assert_as_computed(output.energy, f"{name}.energy")
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator, "output_type": "latent"}
    assert_as_computed(pipeline([0, 2], **arguments).images, f"{name}.samples")


@pytest.mark.parametrize("source", ["pipeline", "export", "run/pipeline"])
def test_weights_come_back_to_the_bit(source):
    model = EGCPipeline.from_pretrained(f"before/{source}").energy_model
    stored = load_file(BEFORE / source / "energy_model" / "diffusion_pytorch_model.safetensors")
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("error:resuming with")
def test_a_run_from_before_goes_on_as_if_it_had_not_been_stopped():
    """As the command line reads it: with uniform timesteps, which were not named then and are no default now."""
    train(load_run_config("before/run/config.yaml", ["training.max_steps=4", "training.resume=auto"]))
    weights = load_file("before/run/pipeline/energy_model/diffusion_pytorch_model.safetensors")
    assert weights.keys() == {name.removeprefix("resumed.") for name in EXPECTED if name.startswith("resumed.")}
    for name, value in weights.items():
        assert_as_computed(value, f"resumed.{name}")


def test_a_cache_from_before_is_read_to_the_bit():
    config = load_config("before/cache_config.yaml")
    cache = open_cache(config.data, load_autoencoder(config.autoencoder), labelled=True)
    item = CachedViews(cache.train, seed=3)[5]
    assert torch.equal(item["view"], EXPECTED["cache.view"])
    assert torch.equal(item["clean_view"], EXPECTED["cache.clean_view"])
    assert item["class_labels"] == EXPECTED["cache.label"]
