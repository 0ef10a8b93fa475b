"""Tiny real components for the tests, made anew each time: no mocks, no downloads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from PIL import Image

from latent_egc import EGCPipeline, EGCTransformer, EGCUNet, EnergyModel
from latent_egc.config import DataConfig
from latent_egc.pipelines.schedulers import default_scheduler

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"
ROOT = Path(__file__).resolve().parents[1]

# Begins a script in which importing latent_egc fails, as on a machine that has only the libraries it stands on.
WITHOUT_THE_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latent_egc":
            raise ModuleNotFoundError("No module named 'latent_egc'")
sys.meta_path.insert(0, Refuse())
"""

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data and weights in ../shared")


def tiny_unet(randomise: bool = True, **overrides) -> EGCUNet:
    """An EGCUNet of a few thousand parameters; `randomise` also fills the layers that start at zero."""
    torch.manual_seed(0)
    config = {
        "sample_size": 4,
        "in_channels": 2,
        "num_classes": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_levels": (1,),
        "num_attention_heads": 2,
        "norm_num_groups": 4,
    } | overrides
    return _filled(EGCUNet(**config), randomise)


def tiny_transformer(randomise: bool = True, **overrides) -> EGCTransformer:
    """As `tiny_unet`, an EGCTransformer with all of its options; 4 tokens."""
    torch.manual_seed(0)
    config = {
        "sample_size": 4,
        "in_channels": 2,
        "num_classes": 3,
        "width": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
        "long_skips": True,
    } | overrides
    return _filled(EGCTransformer(**config), randomise)


def _filled(model: EnergyModel, randomise: bool) -> EnergyModel:
    if randomise:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


TINY_BACKBONES = {"unet": tiny_unet, "transformer": tiny_transformer}


def tiny_kl(latent_channels: int = 2, **overrides) -> AutoencoderKL:
    """An AutoencoderKL with random weights, factor 2."""
    torch.manual_seed(1)
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": latent_channels,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    } | overrides
    return AutoencoderKL(**config).eval()


def tiny_taesd(latent_channels: int = 2) -> AutoencoderTiny:
    """An AutoencoderTiny with random weights, factor 2."""
    torch.manual_seed(2)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=latent_channels,
    ).eval()


def tiny_dc(latent_channels: int = 2) -> AutoencoderDC:
    """An AutoencoderDC with random weights, factor 2."""
    torch.manual_seed(3)
    widths = {"encoder_block_out_channels": (6, 12), "decoder_block_out_channels": (6, 12)}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    vae = AutoencoderDC(
        latent_channels=latent_channels, attention_head_dim=4, scaling_factor=0.4, **widths, **layers, **scales
    )
    return vae.eval()


def tiny_qwen(latent_channels: int = 2) -> AutoencoderKLQwenImage:
    """An AutoencoderKLQwenImage, which is a video autoencoder and scales by channel; random weights, factor 2."""
    torch.manual_seed(4)
    channels = {"latents_mean": [0.1, -0.2, 0.3][:latent_channels], "latents_std": [2.0, 0.5, 1.5][:latent_channels]}
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=latent_channels, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **channels
    ).eval()


def tiny_pipeline(vae: bool = True, names: tuple[str, ...] = ("cat", "dog", "cow"), **overrides) -> EGCPipeline:
    """A pipeline of tiny random networks: 8x8 images through 4x4 latents, classes cat, dog and cow."""
    model = tiny_unet(**overrides).eval()
    names = dict(enumerate(names)) if model.config.num_classes else {}
    pipeline = EGCPipeline(model, tiny_kl() if vae else None, default_scheduler(model), names, 2.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_images(folder: Path, classes=("cat", "cow", "dog"), per_class: int = 7) -> DataConfig:
    """A folder of 8x8 images, each class of its own brightness; 7 of 21 are the validation split."""
    rng = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(60 * level, 60 * level + 120, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return DataConfig(dataset="imagefolder", data_dir=str(folder), image_size=8, validation_fraction=1 / 3)


def gaussian_potential(model: EnergyModel, std: float):
    """U(z, t) of latents from N(0, std^2 I), on the noise schedule of `model`."""

    def potential(latents, timesteps):
        alpha, sigma = model.noise_levels(torch.as_tensor(timesteps))
        return sigma * latents.square().sum(dim=(1, 2, 3)) / (2 * (alpha**2 * std**2 + sigma**2)), []

    return potential


def bf16_convolution_is_right() -> bool:
    """Whether torch's bf16 double backward of a 3x3 convolution over 8 rows is right here; see docs/decisions.md."""
    generator = torch.Generator().manual_seed(0)
    latents, weight = (torch.randn(8, 8, *size, generator=generator) for size in ((8, 8), (3, 3)))

    def gradient(dtype):
        z, w = (tensor.to(dtype).requires_grad_() for tensor in (latents, weight))
        (first,) = torch.autograd.grad(torch.nn.functional.conv2d(z, w, padding=1).square().sum(), z, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w)[0].float()

    exact = gradient(torch.float32)
    return bool((gradient(torch.bfloat16) - exact).norm() < 0.1 * exact.norm())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipeline, *labels, **arguments):
    arguments = {"num_inference_steps": 3, "generator": generator(), "output_type": "pt"} | arguments
    return pipeline(*labels, **arguments).images


def gradient_image(width=20, height=12):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
