"""What a probe may be told; every key, its default and its meaning stand here.

Given on the command line as `--set timesteps=[30,90] heatmap.pooling=1`.

The feature cache takes, for each timestep, rows x (the sum of the blocks' channels) x max(poolings)^2 x 2 bytes (4 in
float32): 1.3 GB for 5,000 rows of the imagenette64 network at 6 timesteps and 4 x 4. An analysis reads one block at one
timestep into memory at a time, as float32; `fusion` reads those that it joins.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from latent_egc.config import ConfigError, apply_overrides, parse_dataclass, within


@dataclass(frozen=True)
class LinearSettings:
    """The linear probe: logistic regression by L-BFGS on standardised features."""

    c: tuple[float, ...] = within((1e-3, 1e-2, 1e-1), 1e-12)  # inverse strengths of the L2 penalty to choose from
    held_out: float = within(0.2, 0.01, 0.9)  # share of the training rows that chooses c, and the best cell
    max_iter: int = within(100, 1)


@dataclass(frozen=True)
class HeatmapSettings:
    """Accuracy of every block at every timestep."""

    pooling: int = within(2, 1)


@dataclass(frozen=True)
class HeadsSettings:
    """The heads other than the linear probe, at the chosen block, timestep and pooling."""

    epochs: int = within(20, 1)
    train_batch_size: int = within(64, 1)
    sgd_learning_rate: float = within(0.003, 1e-9)  # of the linear head, SGD with momentum 0.9
    learning_rate: float = within(1e-3, 1e-9)  # of the others, AdamW; both decay to 0 on a cosine
    weight_decay: float = within(0.05, 0.0)  # AdamW's
    width: int = within(256, 4)  # of the hidden layers and of the tokens, divisible by 4
    neighbours: int = within(20, 1)


@dataclass(frozen=True)
class FusionSettings:
    """DifFormer and DifFeed; their heads train with the settings of `heads`."""

    blocks: tuple[str, ...] | None = None  # null: the num_blocks best of the heat map
    timesteps: tuple[int, ...] | None = None  # null: the num_timesteps best of the heat map
    num_blocks: int = within(3, 1)
    num_timesteps: int = within(3, 1)
    feedback_epochs: int = within(0, 0)  # of DifFeed, two passes of the network a batch; 0: no DifFeed
    feedback_images: int | None = within(None, 1)  # training rows of DifFeed; null: all


@dataclass(frozen=True)
class CKASettings:
    """Linear centred kernel alignment."""

    num_images: int = within(500, 3)  # of the validation rows; memory is this squared times blocks, in float32
    pooling: int = within(2, 1)


@dataclass(frozen=True)
class FewShotSettings:
    """Accuracy with few labels; the images of the other rows are used for the features' mean and deviation alone."""

    shots: tuple[int, ...] = within((1, 5, 20, 100), 1)  # labelled images of each class
    draws: int = within(5, 1)  # of the labelled images
    c: float = within(1e-2, 1e-12)  # fixed: one image a class leaves none to choose it on
    finetune_steps: int = within(0, 0)  # training from the pipeline's weights on the first draw's images; 0: none
    finetune_batch_size: int = within(32, 1)
    finetune_learning_rate: float = within(1e-4, 1e-9)
    finetune_classification_weight: float = within(0.2, 0.0)


@dataclass(frozen=True)
class ProbeSettings:
    """One probe."""

    seed: int = within(0, 0, 2**32 - 1)  # of the choice of rows, of the heads and of the resampling
    noise_seed: int = within(0, 0, 2**32 - 1)  # an image's noise is a function of it and of the row
    num_train_images: int | None = within(None, 2)  # labelled training rows, drawn by the seed; null: all
    num_images: int | None = within(None, 2)  # labelled validation rows, drawn by the seed; null: all
    batch_size: int = within(64, 1)  # images in one forward pass
    num_resamples: int = within(1000, 10)  # of the bootstrap behind each confidence interval
    timesteps: tuple[int, ...] = within((0, 30, 90, 150, 300, 500), 0)
    blocks: tuple[str, ...] | None = None  # null: all of the network
    poolings: tuple[int, ...] = within((1, 2, 4), 1)  # maps averaged to p x p; all must divide the largest
    dtype: Literal["float16", "float32"] = "float16"  # of the features on disk
    block: str | None = None  # where heads, few_shot, ... look; null: the best of the heat map
    timestep: int | None = within(None, 0)  # likewise
    pooling: int | None = within(None, 1)  # null: the best at that block and timestep
    linear: LinearSettings = LinearSettings()
    heatmap: HeatmapSettings = HeatmapSettings()
    heads: HeadsSettings = HeadsSettings()
    fusion: FusionSettings = FusionSettings()
    cka: CKASettings = CKASettings()
    few_shot: FewShotSettings = FewShotSettings()

    def of_analysis(self, analysis: str) -> dict[str, Any]:
        """The plain values that one analysis depends on: all but the sections of the others."""
        shared = {"linear", "heatmap"} | ({"heads"} if analysis == "fusion" else set())
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if not isinstance(v, dict) or k == analysis or k in shared}


def parse_settings(overrides: Sequence[str] = ()) -> ProbeSettings:
    """Settings from overrides of the defaults.

    Raises:
        ConfigError: an unknown key (with a suggestion), a wrong type, a value out of range, or settings that
            contradict each other.
    """
    values: dict[str, Any] = {}
    apply_overrides(values, overrides)
    settings = parse_dataclass(ProbeSettings, values, "")
    for key in ("timesteps", "poolings", "linear.c", "few_shot.shots", "fusion.blocks", "fusion.timesteps", "blocks"):
        value: Any = settings
        for name in key.split("."):
            value = getattr(value, name)
        if value == ():
            raise ConfigError(f"{key} must not be empty")
    largest = max(settings.poolings)
    for p in settings.poolings:
        if largest % p:
            raise ConfigError(f"poolings must all divide the largest, got {p} beside {largest}")
    for key, p in (
        ("heatmap.pooling", settings.heatmap.pooling),
        ("cka.pooling", settings.cka.pooling),
        ("pooling", settings.pooling),
    ):
        if p is not None and p not in settings.poolings:
            raise ConfigError(f"{key} must be one of poolings={list(settings.poolings)}, got {p}")
    for key, steps in (("timestep", (settings.timestep,)), ("fusion.timesteps", settings.fusion.timesteps or ())):
        for t in steps:
            if t is not None and t not in settings.timesteps:
                raise ConfigError(f"{key} must be of timesteps={list(settings.timesteps)}, got {t}")
    if settings.heads.width % 4:
        raise ConfigError(
            f"heads.width must be divisible by 4, the number of attention heads, got {settings.heads.width}"
        )
    return settings
