"""Tiny networks of diffusers to probe, and settings for fast studies."""

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
