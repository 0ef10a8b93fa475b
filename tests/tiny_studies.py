"""Tiny networks of diffusers to probe, and settings for fast studies."""

import numpy as np
import scipy.linalg
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

FAST_EVALUATION = ["num_resamples=20", "classification.num_timesteps=2"]
FAST_PROBE = ["timesteps=[0,90]", "poolings=[1,2]", "num_resamples=20", "linear.c=[0.01]", "linear.held_out=0.3"]
TINY_HEADS = ["heads.epochs=2", "heads.width=8", "heads.neighbours=3"]


def measure(suite, context):
    """What a suite, one of the modules in latent_egc/measuring/suites, finds with the context's settings of it."""
    name = suite.__name__.rpartition(".")[2]
    return suite.run(context, None if suite.Settings is None else getattr(context.settings, name))


def values(result) -> dict[str, float]:
    """The values of a suite's metrics by their names."""
    return {name: metric.value for name, metric in result.metrics.items()}


def tiny_unet2d(**overrides) -> UNet2DModel:
    """8x8 images of 3 channels, two levels."""
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
    """4x4 latents of 2 channels, 4 tokens, 5 classes and the null label."""
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


class Brightness(torch.nn.Module):
    """Mean and deviation of each channel: 6 features; or 3 logits by how bright an image is."""

    def __init__(self, as_logits: bool = False) -> None:
        super().__init__()
        self.as_logits = as_logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(2, 3))
        if self.as_logits:
            return -(mean.mean(dim=1)[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs()
        return torch.cat([mean, images.flatten(2).std(dim=2)], dim=1)


def scipy_frechet(first: np.ndarray, second: np.ndarray) -> float:
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = first.mean(0) - second.mean(0)
    return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
