"""The frozen autoencoder: loading, encoding, its own factors, and recognising it again."""

import io

import pyarrow.parquet
import pytest
import torch
from diffusers import UNet2DModel
from tiny import ROOT, SHARED, needs_shared, tiny_dc, tiny_kl, tiny_qwen, tiny_taesd

from latent_egc.config import AutoencoderConfig, ConfigError, DataConfig
from latent_egc.data.autoencoders import (
    encode_moments,
    fingerprint,
    latent_shape,
    latents_from_moments,
    load_autoencoder,
)
from latent_egc.data.sources import load_splits, read_image
from latent_egc.data.views import central_view
from latent_egc.pipelines.latents import decode_latents, unscale_latents


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved(vae, folder) -> AutoencoderConfig:
    """The configuration that loads `vae` from `folder`."""
    vae.save_pretrained(folder)
    return AutoencoderConfig(path=str(folder))


def peak_signal_to_noise(images: torch.Tensor, others: torch.Tensor) -> float:
    """In dB, of images in [-1, 1]."""
    return float(10 * torch.log10(4 / (images - others).square().mean()))


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd, tiny_dc, tiny_qwen])
def test_loaded_from_a_folder_frozen_in_eval_mode_with_the_same_weights(make, tmp_path):
    vae = make().train()
    loaded = load_autoencoder(saved(vae, tmp_path))
    assert type(loaded) is type(vae)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))


def test_subfolder(tmp_path):
    tiny_kl().save_pretrained(tmp_path / "vae")
    assert load_autoencoder(AutoencoderConfig(str(tmp_path), subfolder="vae")).config.latent_channels == 2
    with pytest.raises(ConfigError, match=r"autoencoder\.subfolder='vea'"):
        load_autoencoder(AutoencoderConfig(str(tmp_path), subfolder="vea"))


def test_none_is_pixel_space(images):
    assert load_autoencoder(AutoencoderConfig(path=None)) is None
    assert latent_shape(None, 8) == (3, 8, 8)
    assert torch.equal(latents_from_moments(None, encode_moments(None, images)), images)
    assert fingerprint(None) == "pixels"


@pytest.mark.parametrize("shift", [None, 0.3])
def test_kl_latents_are_diffusers_mean_and_posterior_sample(shift, images):
    """mode() and sample() of diffusers' own posterior, then (x - shift) * scaling, as Stable Diffusion 3 does it."""
    vae = tiny_kl(scaling_factor=0.7, shift_factor=shift)
    posterior = vae.encode(images).latent_dist
    moments = encode_moments(vae, images)
    assert not moments.requires_grad
    assert moments.shape == (3, 4, 4, 4)

    mean = (posterior.mode() - (shift or 0)) * 0.7
    torch.testing.assert_close(latents_from_moments(vae, moments), mean)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    sample = (posterior.sample(torch.Generator().manual_seed(1)) - (shift or 0)) * 0.7
    torch.testing.assert_close(latents_from_moments(vae, moments, noise), sample)
    torch.testing.assert_close(unscale_latents(vae, mean), posterior.mode())


def test_taesd_latents_are_scaled_and_have_no_posterior(images):
    vae = tiny_taesd()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.2)
    moments = encode_moments(vae, images)
    assert moments.shape == (3, 2, 4, 4)
    expected = (vae.encode(images).latents - 0.2) * 1.5
    torch.testing.assert_close(latents_from_moments(vae, moments), expected)
    torch.testing.assert_close(latents_from_moments(vae, moments, torch.ones_like(moments)), expected)


def test_latents_scaled_by_channel(images):
    """As diffusers' pipelines do it: of Stable Diffusion XL with a scaling factor, of Qwen-Image without."""
    mean, std = torch.tensor([0.3, -1.0])[:, None, None], torch.tensor([2.0, 0.25])[:, None, None]
    vae = tiny_kl(latents_mean=[0.3, -1.0], latents_std=[2.0, 0.25], scaling_factor=0.5)
    moments = encode_moments(vae, images)
    latents = latents_from_moments(vae, moments)
    torch.testing.assert_close(latents, (vae.encode(images).latent_dist.mode() - mean) * 0.5 / std)
    torch.testing.assert_close(unscale_latents(vae, latents), latents * std / 0.5 + mean)

    vae = tiny_qwen()
    moments = encode_moments(vae, images)
    assert moments.shape == (3, 4, 4, 4)
    mean, std = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    frame = vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(latents_from_moments(vae, moments), (frame - mean) / std)
    torch.testing.assert_close(decode_latents(vae, (frame - mean) / std), vae.decode(frame[:, :, None]).sample[:, :, 0])


def test_dc_latents_are_scaled_and_have_no_posterior(images):
    vae = tiny_dc()
    moments = encode_moments(vae, images)
    torch.testing.assert_close(latents_from_moments(vae, moments), vae.encode(images).latent * 0.4)
    torch.testing.assert_close(decode_latents(vae, moments * 0.4), vae.decode(moments).sample)


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd])
def test_slicing_gives_the_same_moments(make, tmp_path, images):
    config = saved(make(), tmp_path)
    whole = load_autoencoder(config)
    sliced = load_autoencoder(AutoencoderConfig(config.path, slicing=True))
    assert sliced.use_slicing
    assert not whole.use_slicing
    torch.testing.assert_close(encode_moments(sliced, images), encode_moments(whole, images))


def test_half_precision_autoencoder_gives_float32_moments(images):
    assert encode_moments(tiny_kl().to(torch.bfloat16), images).dtype == torch.float32


def test_fingerprint_differs_exactly_when_weights_or_factors_differ(tmp_path):
    original = fingerprint(tiny_kl())
    assert fingerprint(load_autoencoder(saved(tiny_kl(), tmp_path))) == original
    assert fingerprint(tiny_kl(scaling_factor=0.5)) != original
    assert fingerprint(tiny_kl(shift_factor=0.5)) != original
    assert fingerprint(tiny_taesd()) != original
    changed = tiny_kl()
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-6
    assert fingerprint(changed) != original


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd, tiny_dc, tiny_qwen])
def test_latent_shape_is_what_encoding_gives(make):
    vae = make(latent_channels=3)
    shape = latent_shape(vae, 12)
    assert latents_from_moments(vae, encode_moments(vae, torch.zeros(1, 3, 12, 12))).shape[1:] == shape == (3, 6, 6)
    with pytest.raises(ConfigError, match=r"data\.image_size must be divisible by .* 2, got 9"):
        latent_shape(vae, 9)


def test_packaged_digits_autoencoder_reconstructs_held_out_digits():
    vae = load_autoencoder(AutoencoderConfig())
    assert latent_shape(vae, 32) == (4, 8, 8)
    table = load_splits(DataConfig(), 10).validation
    digits = torch.stack([central_view(table.image(index), 32) for index in range(0, len(table), 3)])
    latents = latents_from_moments(vae, encode_moments(vae, digits))
    with torch.no_grad():
        decoded = vae.decode(unscale_latents(vae, latents)).sample
    assert peak_signal_to_noise(digits, decoded) >= 22
    assert 0.8 < latents.std() < 1.25


@needs_shared
def test_taesd_reconstructs_natural_images():
    """Far above the 10 dB or so of a grey image; the published autoencoder reaches 22 to 27 dB at 256 px."""
    vae = load_autoencoder(AutoencoderConfig(path=str(SHARED / "taesd")))
    assert latent_shape(vae, 64) == (4, 8, 8)
    file = pyarrow.parquet.ParquetFile(SHARED / "data" / "imagenette" / "validation.parquet")
    rows = next(file.iter_batches(4, columns=["image"])).to_pylist()
    photos = torch.stack([central_view(read_image(io.BytesIO(row["image"]["bytes"]), "photo"), 128) for row in rows])
    latents = latents_from_moments(vae, encode_moments(vae, photos))
    with torch.no_grad():
        decoded = vae.decode(unscale_latents(vae, latents)).sample
    assert peak_signal_to_noise(photos, decoded) > 18
    assert 0.5 < latents.std() < 2


def test_what_is_no_autoencoder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"autoencoder\.path=.*empty.* cannot be loaded"):
        load_autoencoder(AutoencoderConfig(str(tmp_path / "empty")))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(block_out_channels=(4, 4), norm_num_groups=2, **blocks).save_pretrained(tmp_path / "unet")
    with pytest.raises(ConfigError, match="is a UNet2DModel, not an autoencoder"):
        load_autoencoder(AutoencoderConfig(str(tmp_path / "unet")))
    config = saved(tiny_kl(), tmp_path / "damaged")
    weights = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"autoencoder\.path=.*damaged.* cannot be loaded"):
        load_autoencoder(config)


def test_no_scaling_factor_is_written_in_the_sources():
    sources = [*(ROOT / "latent_egc").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    assert sources
    assert not [path for path in sources if "0.18215" in path.read_text()]


@pytest.mark.parametrize(
    "content", ["[1]", "null", '{"a": ', '{"_class_name": "AutoencoderKL", "block_out_channels": "x"}']
)
def test_an_autoencoder_with_a_broken_file_is_named(tmp_path, content):
    tiny_kl().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"autoencoder\.path='.*vae' cannot be loaded"):
        load_autoencoder(AutoencoderConfig(path=str(tmp_path / "vae")))
