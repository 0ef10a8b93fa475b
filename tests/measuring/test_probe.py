"""Probing: features of every kind of denoiser, their cache, and the linear probe."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import FAST_PROBE, TINY_BACKBONES, tiny_kl, tiny_pipeline, write_images

from latent_egc.config import ConfigError
from latent_egc.data.sources import load_splits
from latent_egc.measuring import Report
from latent_egc.measuring import feature_cache as cache_module
from latent_egc.measuring.denoisers import Denoiser, load_denoiser
from latent_egc.measuring.linear_probe import linear_probe
from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.probe_settings import LinearSettings, parse_settings


def tiny_unet2d(**overrides) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**config | overrides)


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=3,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
    )


# --- denoisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
@pytest.mark.parametrize("class_embedding", [False, True])
def test_hooks_read_what_the_network_calls_its_features(backbone, class_embedding):
    network = TINY_BACKBONES[backbone](in_channels=3, class_embedding=class_embedding)
    denoiser = Denoiser(network, None, network.alphas_cumprod)
    latents = torch.randn(2, 3, 4, 4)
    found, expected = denoiser.features(latents, 90), network.features(latents, 90)
    assert list(found) == list(expected) == list(denoiser.blocks)
    for name, maps in expected.items():
        torch.testing.assert_close(found[name], maps)


@torch.no_grad()
def test_unet_of_diffusers(tmp_path):
    """The last block's features, put through the output layers, are the network's output."""
    network = tiny_unet2d()
    DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    pixels, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noisy = scheduler.add_noise(pixels, noise, torch.tensor([90, 90]))
    torch.testing.assert_close(denoiser.noised(denoiser.encode(pixels), noise, 90), noisy)
    maps = denoiser.features(noisy, 90)
    sizes = {name: (m.shape[1], m.shape[-1]) for name, m in maps.items()}
    assert sizes == {
        "in": (8, 8),
        "down.0.0": (8, 8),
        "down.1.0": (16, 4),
        "mid.0": (16, 4),
        "up.1.0": (16, 4),
        "up.1.1": (16, 4),
        "up.0.0": (8, 8),
        "up.0.1": (8, 8),
    }
    output = network.conv_out(network.conv_act(network.conv_norm_out(maps["up.0.1"])))
    torch.testing.assert_close(output, network(noisy, 90).sample)
    assert denoiser.feedback_pairs == [("up.1.1", "down.1.0"), ("up.0.1", "down.0.0")]


@torch.no_grad()
def test_dit_of_diffusers_sees_the_null_label(tmp_path):
    network = tiny_dit()
    vae = tiny_kl()
    DiTPipeline(network, vae, DDPMScheduler(), {0: "a"}).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    assert denoiser.image_size == 8
    pixels, latents = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 4, 4)
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(denoiser.encode(pixels), expected)
    maps = denoiser.features(latents, 300)
    assert list(maps) == ["in", "block.0", "block.1", "block.2"]
    timesteps, labels = torch.tensor([300, 300]), torch.tensor([5, 5])
    tokens = network.eval().pos_embed(latents)
    for i, block in enumerate(network.transformer_blocks):
        tokens = block(tokens, timestep=timesteps, class_labels=labels)
        torch.testing.assert_close(maps[f"block.{i}"], tokens.transpose(1, 2).reshape(2, 16, 2, 2))
    assert denoiser.feedback_pairs == [("block.2", "block.0")]


def test_a_bare_network_gets_ddpms_schedule(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path)
    torch.testing.assert_close(load_denoiser(str(tmp_path)).alphas_cumprod, DDPMScheduler().alphas_cumprod)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet2d", "dit", "unet", "transformer"])
def test_edits_take_a_blocks_place(kind):
    """The identity changes nothing; another map reaches the later blocks and no earlier one."""
    if kind in TINY_BACKBONES:
        network = TINY_BACKBONES[kind](in_channels=3)
    else:
        network = tiny_unet2d() if kind == "unet2d" else tiny_dit()
    vae = tiny_kl() if kind == "dit" else None
    denoiser = Denoiser(network, vae, DDPMScheduler().alphas_cumprod)
    latents = torch.randn(2, denoiser.channels, denoiser.sample_size, denoiser.sample_size)
    plain, (_, earlier) = denoiser.features(latents, 90), denoiser.feedback_pairs[0]
    for name, maps in denoiser.features(latents, 90, {earlier: lambda maps: maps}).items():
        torch.testing.assert_close(maps, plain[name])
    edited = denoiser.features(latents, 90, {earlier: lambda maps: maps.flip(0)})
    torch.testing.assert_close(edited[earlier], plain[earlier].flip(0))
    names = list(plain)
    place = names.index(earlier)
    assert all(torch.equal(edited[name], plain[name]) for name in names[:place])
    assert not any(torch.allclose(edited[name], plain[name]) for name in names[place:])


def test_denoisers_that_cannot_be_probed(tmp_path):
    tiny_kl().save_pretrained(tmp_path / "vae")
    tiny_unet2d(num_class_embeds=3).save_pretrained(tmp_path / "conditional")
    tiny_unet2d(in_channels=2).save_pretrained(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("vae", "an? AutoencoderKL cannot be probed"),
        ("conditional", "no null label"),
        ("two", "takes 2 channels, pixels, as there is no autoencoder, have 3"),
        ("empty", "holds no pipeline"),
        ("none", "no such run, pipeline or network"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_denoiser(str(tmp_path / folder))


# --- the cache ------------------------------------------------------------------------------------------------------


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
    maps = pipeline.energy_model.features(alpha * latents + sigma * noise, 90)
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


def test_classes_need_not_be_the_pipelines(tmp_path):
    """Integer labels without names: as many classes as there are."""
    rows = datasets.Dataset.from_dict({"image": [np.zeros((8, 8, 3), np.uint8)] * 6, "label": [0, 1, 4, -1, 1, 0]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    data = replace(write_images(tmp_path / "images"), dataset="parquet", data_dir=None, validation_fraction=0.5)
    data = replace(data, data_files=str(tmp_path / "a.parquet"))
    assert load_splits(data, "any").class_names == ["0", "1", "2", "3", "4"]


# --- the linear probe -----------------------------------------------------------------------------------------------


def test_linear_probe_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 160)
    features = (rng.standard_normal((160, 2, 2, 2)) * 5 + 2 * labels[:, None, None, None] + 7).astype(np.float32)
    features[:, 0, 0, 0] = 4.0  # constant
    config = LinearSettings(c=(1e-4, 1e-2, 1.0), held_out=0.25)
    score, predicted = linear_probe(features[:100], labels[:100], features[100:], labels[100:], config, seed=3)

    scaler = StandardScaler().fit(features[:100].reshape(100, -1))
    train, test = (scaler.transform(x.reshape(len(x), -1)) for x in (features[:100], features[100:]))
    order = np.random.default_rng(3).permutation(100)
    held_out, fitting = order[:25], order[25:]
    accuracies = []
    for c in config.c:
        model = LogisticRegression(C=c, max_iter=100).fit(train[fitting], labels[fitting])
        accuracies.append((model.predict(train[held_out]) == labels[held_out]).mean())
    best_c = config.c[int(np.argmax(accuracies))]
    model = LogisticRegression(C=best_c, max_iter=100).fit(train, labels[:100])
    assert score.held_out == pytest.approx(max(accuracies))
    assert score.c == best_c
    assert np.array_equal(predicted, model.predict(test))
    assert score.accuracy == pytest.approx((model.predict(test) == labels[100:]).mean())
    with pytest.raises(ConfigError, match=r"linear.held_out=0.25 of 1 training rows leaves"):
        linear_probe(features[:1], labels[:1], features, labels, config, seed=0)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timestep=5", r"timestep must be of timesteps=\[0, 90\], got 5"),
        ("poolings=[2,3]", "poolings must all divide the largest, got 2 beside 3"),
        ("heatmap.pooling=4", r"heatmap.pooling must be one of poolings=\[1, 2\], got 4"),
        ("timesteps=[]", "timesteps must not be empty"),
        ("heads.width=6", "heads.width must be divisible by 4"),
        ("head.width=8", r"unknown key head; did you mean heads\?"),
    ],
)
def test_settings_that_cannot_be_used(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings([*FAST_PROBE, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("blocks=[mid.7]", r"blocks: the network has no block 'mid.7', it has in, down.0.0"),
        ("block=up.9.0", r"block: 'up.9.0' is not among the blocks in, "),
        ("timesteps=[1000]", "timesteps must be below 1000, got 1000"),
    ],
)
def test_settings_that_do_not_fit_the_network(probe_context, override, message):
    with pytest.raises(ConfigError, match=message):
        probe_context(override, extract=False)


def test_a_report_is_of_one_denoiser(tmp_path):
    """The noise schedule is a part of what a report is of."""
    network = tiny_unet2d()
    prints = {
        Denoiser(network, None, DDPMScheduler(beta_schedule=schedule).alphas_cumprod).fingerprint
        for schedule in ("linear", "squaredcos_cap_v2")
    }
    assert len(prints) == 2
    assert Report(tmp_path, {"fingerprint": prints.pop()}).content["suites"] == {}
