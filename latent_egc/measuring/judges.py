"""Classifiers that are not the pipeline's own, which say what its images show.

They judge 8-bit images, as files hold them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from latent_egc.config import ConfigError
from latent_egc.data.sources import ImageTable
from latent_egc.measuring import feature_extractors
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import Extractor

PIXELS_SIZE = 8  # of the images that `pixel_judge` sees


@dataclass(frozen=True)
class Judge:
    """A named classifier."""

    name: str  # as it stands in the metrics' names
    scores: Callable[[torch.Tensor], np.ndarray]  # images (N, 3, H, W) uint8 to (N, K), the higher the likelier
    note: str | None = None  # how it was made

    def predict(self, images: torch.Tensor) -> np.ndarray:
        """Class ids (N,) of images (N, 3, H, W) uint8."""
        return self.scores(images).argmax(axis=1)


def load_judge(context: EvaluationContext, path: str, key: str, size: int | None = None) -> Judge:
    """A TorchScript classifier, images in [0, 1] to logits.

    Args:
        context: of the study.
        path: of the file.
        key: of the setting that names it.
        size: height and width of the images that it knows; None: the pipeline's.

    Raises:
        ConfigError: it cannot be loaded, cannot judge such images, or tells other classes apart.
    """
    device, size = context.accelerator.device, size or context.pipeline.image_size
    program = feature_extractors.load_torchscript(path, key, device)

    def logits(images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != size:
            images = to_uint8(F.interpolate(images, (size, size), mode="bilinear", antialias=True)) / 255
        return program(images)

    judge = Extractor(Path(path).stem, logits)
    try:
        num_logits = judge(torch.zeros(1, 3, size, size, device=device)).shape[1]
    except (torch.jit.Error, RuntimeError, IndexError) as error:
        what = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{key}: {path} judges no images of {size} px ({what}); {key}_size is the size that it knows"
        ) from error
    if num_logits != context.num_classes:
        raise ConfigError(f"{key}: {path} tells {num_logits} classes apart, the pipeline has {context.num_classes}")
    return Judge(judge.name, lambda images: features_of(context, judge, images))


def linear_judge(context: EvaluationContext, extractor: Extractor, num_images: int) -> Judge:
    """A logistic regression on features of training images, decoded through the autoencoder as samples are."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    name = f"logistic regression on {extractor.name}"
    return _trained(context, name, classifier, lambda images: features_of(context, extractor, images), num_images)


def pixel_judge(context: EvaluationContext, num_images: int) -> Judge:
    """A support vector machine on images as means of 8 x 8 areas, which scikit-learn's digits are as they come."""

    def features(images: torch.Tensor) -> np.ndarray:
        return F.adaptive_avg_pool2d(images.float() / 255, PIXELS_SIZE).flatten(1).numpy()

    return _trained(context, "a support vector machine on pixels", SVC(), features, num_images)


def _trained(
    context: EvaluationContext,
    name: str,
    classifier: ClassifierMixin,
    features: Callable[[torch.Tensor], np.ndarray],
    num_images: int,
) -> Judge:
    """A scikit-learn classifier of features, fitted to training images that went through the autoencoder."""
    train = context.splits.train
    rows = context.choose(np.flatnonzero(train.labels >= 0), num_images)
    rows = context.readable(train, rows, context.data.skip_corrupt)
    classifier.fit(features(reconstructed(context, train, rows)), train.labels[rows])

    def scores(images: torch.Tensor) -> np.ndarray:
        found = classifier.decision_function(features(images))
        if found.ndim == 1:  # of two classes scikit-learn gives the second's alone
            found = np.stack([-found, found], axis=1)
        scores = np.full((len(found), context.num_classes), -np.inf)  # of a class that no image had
        scores[:, classifier.classes_] = found
        return scores

    note = f"The judge was trained on {len(rows)} training images that went through the autoencoder."
    return Judge(name, scores, note)


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
