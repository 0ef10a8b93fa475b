"""Features on disk."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny import tiny_pipeline
from tiny_studies import tiny_unet2d

from latent_egc.config import ConfigError
from latent_egc.measuring import feature_cache as cache_module
from latent_egc.measuring.denoisers import Denoiser
from latent_egc.measuring.probe_context import Place


@torch.no_grad()
def test_cached_features_are_those_of_the_noised_image(probe_context, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 4)
    probe = probe_context("batch_size=3", "dtype=float32")
    images = [probe.splits.train.image(row) for row in range(len(probe.splits.train))]
    pipeline = tiny_pipeline(names=("cat", "cow", "dog"))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipeline.encode(pixels)
    torch.testing.assert_close(probe.cache.latents("train"), latents, atol=1e-5, rtol=1e-4)
    noise = probe.cache.noise("train", range(14))
    alpha, sigma = pipeline.energy_model.noise_levels(torch.tensor(90))
    denoiser = Denoiser(pipeline.energy_model, pipeline.vae, pipeline.energy_model.alphas_cumprod)
    maps = denoiser.features(alpha * latents + sigma * noise, 90)
    assert list(maps) == probe.cache.blocks
    for block, expected in maps.items():
        for p in (1, 2):
            found = torch.from_numpy(probe.cache.features("train", 90, block, p))
            torch.testing.assert_close(found, F.adaptive_avg_pool2d(expected, p), atol=1e-4, rtol=1e-4)


def test_noise_is_a_function_of_seed_split_and_row(probe_context):
    cache, other = probe_context(extract=False).cache, probe_context("noise_seed=1", extract=False).cache
    noise = cache.noise("train", [3, 5])
    assert torch.equal(noise[1], cache.noise("train", [5])[0])
    assert not torch.equal(noise, cache.noise("validation", [3, 5]))
    assert not torch.equal(noise, other.noise("train", [3, 5]))
    assert cache.folder != other.folder
    many = cache.noise("train", range(2000))
    assert many.mean().item() == pytest.approx(0, abs=0.03)
    assert many.var().item() == pytest.approx(1, abs=0.03)


def test_extraction_goes_on_behind_the_last_whole_shard(probe_context, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 4)
    whole = probe_context(extract=False)
    passes = []
    plain = Denoiser.features

    def counted(self, *arguments):
        passes.append(len(arguments[0]))
        if len(passes) == 4:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Denoiser, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        whole.cache.extract((0, 90), Accelerator(cpu=True))
    shards = sorted(str(p.relative_to(whole.cache.folder)) for p in whole.cache.folder.rglob("t*/*/*"))
    assert shards == [f"t{t:04d}/train/0000{i}.safetensors" for t, i in ((0, 0), (0, 1), (90, 0))]
    whole.cache.extract((0, 90), Accelerator(cpu=True))
    # 14 + 7 rows are 6 shards, at 2 timesteps 12 passes; 3 were done.
    assert len(passes) == 4 + 9
    whole.cache.extract((0, 90), Accelerator(cpu=True))
    assert len(passes) == 4 + 9
    assert not list(whole.cache.folder.rglob("*.tmp"))


def test_float16_that_is_too_small_is_an_error(probe_context, monkeypatch):
    plain = Denoiser.features
    monkeypatch.setattr(Denoiser, "features", lambda *a: {k: 1e6 * v for k, v in plain(*a).items()})
    with pytest.raises(ConfigError, match=r"features of in at timestep 0 do not fit dtype=float16"):
        probe_context()


def test_another_network_has_another_cache(probe_context):
    network = tiny_unet2d()
    first, second = (
        probe_context(extract=False),
        probe_context(denoiser=Denoiser(network, None, DDPMScheduler().alphas_cumprod)),
    )
    assert first.cache.folder != second.cache.folder
    assert json.loads((second.cache.folder / "cache.json").read_text())["denoiser"].startswith("UNet2DModel-")
    assert second.probe(Place("up.0.1", 90, 2))[0].accuracy >= 0
    shard = load_file(second.cache.folder / "t0090" / "validation" / "00000.safetensors")
    assert shard["mid.0"].shape == (7, 16, 2, 2)
    assert shard["mid.0"].dtype == torch.float16
