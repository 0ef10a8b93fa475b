"""The instrument of the suites that judge samples: features, distances to a reference, and a judge of classes.

Samples are rounded to 8 bits as saved images are. Numbers of different extractors, sample counts or references do not
compare.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from latent_egc.config import ConfigError, file_path, within
from latent_egc.data.stream import noise_generator
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import (
    Extractor,
    frechet_distance,
    load_extractor,
    moments,
    precision_and_recall,
)
from latent_egc.measuring.judges import Judge, features_of, linear_judge, load_judge, reconstructed, to_uint8
from latent_egc.measuring.reference_sets import ArchivedSet, TrainingSet
from latent_egc.measuring.results import Metric


@dataclass(frozen=True)
class InstrumentSettings:
    """What samples are measured with: the first settings of each suite that judges samples."""

    # DINOv2 of transformers (Hub id or folder), inception, or TorchScript files: programs, which can write files.
    features: tuple[str, ...] = file_path(())
    # A TorchScript classifier, images in [0, 1] to logits; null: a linear one on the features.
    judge: str | None = file_path()
    judge_size: int | None = within(None, 1)  # of the images that it knows, pixels; null: the pipeline's
    num_reference_images: int | None = within(None, 5)  # of the training split; null: all of it
    num_judge_images: int = within(1000, 10)  # training images for the linear judge


@dataclass(frozen=True)
class Quality:
    """What a set of samples is worth, by the first extractor and the judge."""

    frechet_distance: float
    precision: float  # a share, as the two below
    recall: float
    agreement: Metric  # share of samples to which the judge gives the class that was asked for

    @property
    def f_score(self) -> float:
        """Harmonic mean of precision and recall, 0 where both are."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-12)


def sample_images(
    context: EvaluationContext, count: int, labels: np.ndarray | None, description: str = "sample", **arguments: Any
) -> torch.Tensor:
    """(N, 3, H, W) uint8; sample i starts from noise that is a function of (seed, i).

    Args:
        context: of the study, whose pipeline samples.
        count: N.
        labels: (N,) class ids, or None.
        description: unique within the suite; the images are kept under it until the suite is finished.
        arguments: others of the pipeline's call.
    """
    pipeline = context.pipeline
    pipeline.set_progress_bar_config(disable=True)

    def sampled(positions: range) -> torch.Tensor:
        images = pipeline(
            None if labels is None else [int(labels[i]) for i in positions],
            num_images_per_label=len(positions) if labels is None else 1,
            generator=[noise_generator(context.settings.seed, i) for i in positions],
            output_type="pt",
            batch_size=len(positions),
            **arguments,
        ).images
        return to_uint8(images)

    return context.over_in_parts(count, sampled, description)


class SampleQuality:
    """Measures samples against a reference.

    Args:
        context: of the study.
        settings: the instrument's.
        suite: whose settings they are.
        reference: what samples are compared with; None: images of the training split.

    Attributes:
        extractors: at least one.

    Raises:
        ConfigError: no extractor, weights that cannot be loaded, or a judge of other classes.
    """

    def __init__(
        self,
        context: EvaluationContext,
        settings: InstrumentSettings,
        suite: str,
        reference: ArchivedSet | None = None,
    ) -> None:
        self.context, self.settings = context, settings
        device = context.accelerator.device
        if not settings.features:
            raise ConfigError(
                f"{suite}.features must name at least one extractor: a TorchScript file, images (N, 3, H, W) in [0, 1] "
                "to features (N, D), a DINOv2 of transformers such as facebook/dinov2-base, or inception"
            )
        self.extractors = [load_extractor(source, device, f"{suite}.features") for source in settings.features]
        self._given_judge: Judge | None = None
        if settings.judge is not None:
            self._given_judge = load_judge(context, settings.judge, f"{suite}.judge", settings.judge_size)
        drawn = TrainingSet(context, settings.num_reference_images)
        self.reference = drawn if reference is None else reference

    def features(self, extractor: Extractor, images: torch.Tensor) -> np.ndarray:
        """(N, D) of 8-bit images (N, 3, H, W)."""
        return features_of(self.context, extractor, images)

    @cached_property
    def decoded(self) -> torch.Tensor:
        """(M, 3, H, W) uint8: the judged validation images through the autoencoder and back."""
        return reconstructed(self.context, self.context.splits.validation, self.context.rows)

    @cached_property
    def judge(self) -> Judge:
        """The one of the settings, or one made of the first extractor's features: independent of what is judged, but
        for the autoencoder.
        """
        return self._given_judge or linear_judge(self.context, self.extractors[0], self.settings.num_judge_images)

    @property
    def judge_notes(self) -> list[str]:
        """Where the judge comes from, if it was made here."""
        return [] if self.judge.note is None else [self.judge.note]

    @cached_property
    def judge_accuracy(self) -> Metric:
        """The judge's own, on validation images that went through the autoencoder."""
        return self.context.accuracy(self.judge.predict(self.decoded) == self.context.labels)

    @cached_property
    def _first_real(self) -> np.ndarray:
        return self.reference.features(self.extractors[0])

    def notes(self, what: str, num_samples: int) -> list[str]:
        """What a reader of `of`'s numbers must know.

        Args:
            what: how they were sampled.
            num_samples: in each call of `of`.
        """
        few = min(num_samples, len(self._first_real))
        return [
            f"{what}; compared with {self.reference}.",
            *too_few(self.extractors[0], "samples", few, self._first_real.shape[1]),
            *self.judge_notes,
        ]

    def of(self, samples: torch.Tensor, labels: np.ndarray) -> Quality:
        """What samples (N, 3, H, W) uint8 of these labels (N,) are worth."""
        generated = self.features(self.extractors[0], samples)
        precision, recall = precision_and_recall(self._first_real, generated)
        return Quality(
            frechet_distance(moments(self._first_real), moments(generated)),
            precision,
            recall,
            self.context.accuracy(self.judge.predict(samples) == labels),
        )


def too_few(extractor: Extractor, what: str, num_images: int, num_dimensions: int) -> list[str]:
    """A warning, given and returned, where a Frechet distance has no more images than dimensions; or none."""
    if num_images > num_dimensions:
        return []
    message = (
        f"FD-{extractor.name}: {num_images} {what} for {num_dimensions} feature dimensions; the covariance is singular "
        f"and the distance too large, take more than {num_dimensions}"
    )
    warnings.warn(message, stacklevel=3)
    return [message + "."]
