"""Classifiers that are not the pipeline's own, which say what its images show.

They judge 8-bit images, as files hold them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from latent_egc.config import ConfigError
from latent_egc.data.sources import ImageTable
from latent_egc.measuring import feature_extractors
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import Extractor


@dataclass(frozen=True)
class Judge:
    """A named classifier: images (N, 3, H, W) uint8 to class ids (N,)."""

    name: str  # as it stands in the metrics' names
    predict: Callable[[torch.Tensor], np.ndarray]
    note: str | None = None  # how it was made


def load_judge(context: EvaluationContext, path: str, key: str) -> Judge:
    """A TorchScript classifier, images in [0, 1] to logits.

    Raises ConfigError, which names the setting `key`: it cannot be loaded, or tells other classes apart.
    """
    device, size = context.accelerator.device, context.pipeline.image_size
    judge = Extractor(Path(path).stem, feature_extractors.load_torchscript(path, key, device))
    num_logits = judge(torch.zeros(1, 3, size, size, device=device)).shape[1]
    if num_logits != context.num_classes:
        raise ConfigError(f"{key}: {path} tells {num_logits} classes apart, the pipeline has {context.num_classes}")
    return Judge(judge.name, lambda images: features_of(context, judge, images).argmax(axis=1))


def linear_judge(context: EvaluationContext, extractor: Extractor, num_images: int) -> Judge:
    """A logistic regression on features of training images, decoded through the autoencoder as samples are."""
    train = context.splits.train
    rows = context.choose(np.flatnonzero(train.labels >= 0), num_images)
    rows = context.readable(train, rows, context.data.skip_corrupt)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    classifier.fit(features_of(context, extractor, reconstructed(context, train, rows)), train.labels[rows])
    return Judge(
        f"logistic regression on {extractor.name}",
        lambda images: classifier.predict(features_of(context, extractor, images)),
        f"The judge was trained on {len(rows)} training images that went through the autoencoder.",
    )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as an 8-bit file holds them."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def reconstructed(context: EvaluationContext, table: ImageTable, rows: Sequence[int]) -> torch.Tensor:
    """(M, 3, H, W) uint8: images of a split through the autoencoder and back, as samples are decoded."""
    pipeline = context.pipeline

    @torch.no_grad()
    def decoded(positions: range) -> torch.Tensor:
        latents = pipeline.encode(context.pixel_values(table, rows[list(positions)]))
        return to_uint8(pipeline.decode(latents).float() / 2 + 0.5)

    return context.over(len(rows), decoded, f"autoencoder, {table.name}")


def features_of(context: EvaluationContext, extractor: Extractor, images: torch.Tensor) -> np.ndarray:
    """(N, D) of 8-bit images (N, 3, H, W)."""

    def features(batch: range) -> torch.Tensor:
        return extractor(images[list(batch)].to(context.accelerator.device) / 255)

    return context.over(len(images), features, extractor.name).numpy()
