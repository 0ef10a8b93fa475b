"""What an evaluation may be told: one section a suite; every key, its default and its meaning stand here.

Given on the command line as `--set num_images=500 classification.num_timesteps=10`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latent_egc.config import apply_overrides, parse_dataclass, within


@dataclass(frozen=True)
class ClassificationSettings:
    """Accuracy at timestep 0, and against the noise level."""

    num_timesteps: int = within(20, 2)  # points of the noise curve, evenly over [0, T)


@dataclass(frozen=True)
class CalibrationSettings:
    """Calibration before and after temperature scaling."""

    num_bins: int = within(15, 1)  # of equal width, for the expected calibration error and the diagram
    fit_fraction: float = within(0.5, 0.01, 0.99)  # share of the images that the temperature is fitted on


@dataclass(frozen=True)
class GenerationSettings:
    """Samples against the training split."""

    features: tuple[str, ...] = ()  # TorchScript files, DINOv2 of transformers (Hub id or folder), or inception
    judge: str | None = None  # TorchScript classifier, images in [0, 1] to logits; null: a linear one on the features
    num_samples: int = within(1000, 5)
    num_reference_images: int | None = within(None, 5)  # of the training split; null: all of it
    num_judge_images: int = within(1000, 10)  # training images for the linear judge
    num_inference_steps: int = within(50, 1)
    guidance_scale: float | None = within(None, 0.0)  # null: the pipeline's own
    kid_subsets: int = within(100, 1)
    kid_subset_size: int = within(1000, 2)


@dataclass(frozen=True)
class RobustnessSettings:
    """Attacks on pixels in [0, 1]; an eps in l_inf is given in 1/255."""

    num_images: int = within(500, 1)
    linf_eps_255: tuple[float, ...] = within((1.0, 2.0, 4.0, 8.0), 1e-3, 255.0)
    l2_eps: tuple[float, ...] = within((0.25, 0.5, 1.0), 1e-3)
    pgd_steps: int = within(20, 1)
    pgd_restarts: int = within(2, 1)  # random starts, each on the images that still stand
    plain: str | None = None  # pipeline or run of a plainly trained classifier, attacked alike for comparison
    num_autoattack_images: int = within(100, 0)  # 0: no AutoAttack
    autoattack_linf_eps_255: float = within(4.0, 1e-3, 255.0)
    autoattack_l2_eps: float = within(0.5, 1e-3)
    autoattack_steps: int = within(100, 1)  # of each of the two APGD
    autoattack_queries: int = within(500, 1)  # of Square, for each image that still stands; the original has 5000
    num_check_images: int = within(100, 1)  # for the checks of gradient masking
    check_eps_255: float = within(4.0, 1e-3, 255.0)  # of the checks, the pictures and denoised classification
    check_steps: tuple[int, ...] = within((1, 5, 20, 100), 1)
    num_denoise_images: int = within(50, 1)
    denoise_timesteps: tuple[int, ...] = within((50, 150), 0)  # (): no denoised classification
    denoise_draws: int = within(4, 1)  # of the noise, averaged in each forward pass


@dataclass(frozen=True)
class CorruptionSettings:
    """The 15 common corruptions at 5 severities."""

    num_images: int | None = within(200, 1)  # each is encoded and classified 76 times; null: all


@dataclass(frozen=True)
class OODSettings:
    """Detection of images from a second dataset."""

    data: str | None = None  # YAML file whose data section describes it; its validation split is taken
    num_images: int | None = within(None, 1)  # of it, drawn by the seed; null: all
    timesteps: tuple[int, ...] = within((10, 50, 100, 200, 400), 0)  # noise levels at which the energy is read too


@dataclass(frozen=True)
class LikelihoodSettings:
    """Density of the latents."""

    num_images: int | None = within(200, 2)  # null: all that are evaluated
    num_steps: int = within(60, 1)  # of Heun's method, each one gradient and one divergence of the batch


@dataclass(frozen=True)
class EvaluationSettings:
    """One evaluation."""

    seed: int = within(0, 0, 2**32 - 1)  # of the noise, the resampling and every choice of images
    num_images: int | None = within(None, 1)  # evaluated images, drawn by the seed; null: the whole validation split
    batch_size: int = within(64, 1)
    num_resamples: int = within(1000, 10)  # of the bootstrap behind each confidence interval
    classification: ClassificationSettings = ClassificationSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    generation: GenerationSettings = GenerationSettings()
    robustness: RobustnessSettings = RobustnessSettings()
    corruption: CorruptionSettings = CorruptionSettings()
    ood: OODSettings = OODSettings()
    likelihood: LikelihoodSettings = LikelihoodSettings()

    def of_suite(self, suite: str) -> dict[str, Any]:
        """The plain values that one suite's result depends on: those of every suite, and its own section."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if not isinstance(value, dict)} | {suite: values[suite]}


def parse_settings(overrides: Sequence[str] = ()) -> EvaluationSettings:
    """Settings from overrides of the defaults.

    Raises:
        ConfigError: an unknown key (with a suggestion), a wrong type or a value out of range.
    """
    values: dict[str, Any] = {}
    apply_overrides(values, overrides)
    return parse_dataclass(EvaluationSettings, values, "")
