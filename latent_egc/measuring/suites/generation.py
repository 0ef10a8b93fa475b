"""Suite `generation`: how good, how varied, how faithful to their class, and how new are the samples?

Samples are rounded to 8 bits as saved images are, and compared with the training split or a file's images. The same
numbers of validation images that only went through the autoencoder say what the autoencoder costs.
"""

from dataclasses import dataclass

import einops
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from latent_egc.config import ConfigError, file_path, within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import (
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_and_recall,
)
from latent_egc.measuring.image_archives import read_archive
from latent_egc.measuring.reference_sets import ArchivedSet
from latent_egc.measuring.results import Figure, Metric, SuiteResult
from latent_egc.measuring.sample_quality import InstrumentSettings, SampleQuality, sample_images, too_few


@dataclass(frozen=True)
class Settings(InstrumentSettings):
    """Samples against a reference."""

    samples: str | None = file_path()  # .npz of ADM's layout, with or without classes; null: the pipeline draws them
    reference: str | None = file_path()  # .npz of images, of mu and sigma, or of both; null: the training split
    num_samples: int = within(1000, 5)
    num_inference_steps: int | None = within(None, 1)  # null: the pipeline's own
    guidance_scale: float | None = within(None, 0.0)  # null: the pipeline's own
    kid_subsets: int = within(100, 1)
    kid_subset_size: int = within(1000, 2)


THROUGH = ", validation images through the autoencoder"
SHOWN_CLASSES, SHOWN_PER_CLASS, SHOWN_NEIGHBOURS = 10, 8, 5


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """FD, KID, precision and recall by every extractor; class agreement; a grid; nearest training neighbours.

    Raises:
        ConfigError: no extractor, weights that cannot be loaded, or a judge of other classes.
    """
    reference = None
    if settings.reference is not None:
        archive = read_archive(settings.reference, "generation.reference", context.image_size)
        reference = ArchivedSet(context, archive, "generation.reference")
    quality = SampleQuality(context, settings, "generation", reference)
    samples, labels = _read(context, settings.samples) if settings.samples is not None else _drawn(context, settings)
    metrics: dict[str, Metric] = {}
    notes: list[str] = []
    pictures = []
    for number, extractor in enumerate(quality.extractors):
        real = quality.reference.features(extractor)
        real_moments = quality.reference.moments(extractor, real)
        generated, floor = (quality.features(extractor, images) for images in (samples, quality.decoded))
        for what, found in (("samples", generated), ("validation images", floor)):
            num_images = len(found) if real is None else min(len(found), len(real))
            notes += too_few(extractor, what, num_images, found.shape[1])
        metrics[f"FD-{extractor.name}"] = Metric(frechet_distance(real_moments, moments(generated)))
        if real is not None:
            metrics |= _kernel_distance(context, settings, extractor.name, real, generated)
            metrics |= _precision_and_recall(extractor.name, real, generated)
        metrics[f"FD-{extractor.name}{THROUGH}"] = Metric(frechet_distance(real_moments, moments(floor)))
        if real is not None:
            metrics |= _precision_and_recall(extractor.name, real, floor, THROUGH)
        if extractor.to_logits is not None:
            logits = extractor.to_logits(torch.from_numpy(generated))
            score, deviation = inception_score(logits, context.settings.seed)
            metrics |= {"Inception score": Metric(score), "Inception score, deviation over parts": Metric(deviation)}
        if number == 0 and real is not None:
            pictures.append(_neighbours(quality, samples, generated, real))
    if labels is not None:
        agreement = context.accuracy(quality.judge.predict(samples) == labels)
        metrics[f"class agreement by {quality.judge.name}"] = agreement
        metrics["the judge's accuracy on decoded validation images"] = quality.judge_accuracy
        notes += quality.judge_notes
    notes.insert(0, _what_was_compared(context, settings, quality, len(samples)))
    return SuiteResult(len(samples), metrics, figures=[_grid(context, samples, labels), *pictures], notes=notes)


def _drawn(context: EvaluationContext, settings: Settings) -> tuple[torch.Tensor, np.ndarray | None]:
    """The pipeline's samples (N, 3, H, W) uint8 and their classes (N,), equally many of every class; None without."""
    labels = None if context.num_classes is None else np.arange(settings.num_samples) % context.num_classes
    arguments = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    return sample_images(context, settings.num_samples, labels, **arguments), labels


def _read(context: EvaluationContext, path: str) -> tuple[torch.Tensor, np.ndarray | None]:
    """The samples and classes of a file. Raises ConfigError: it holds no samples, or classes that there are not."""
    archive = read_archive(path, "generation.samples", context.image_size)
    if archive.images is None:
        raise ConfigError(f"generation.samples: {path} holds statistics only; samples are wanted, as arr_0")
    labels = None if context.num_classes is None else archive.labels
    if labels is not None and not (labels.min() >= 0 and labels.max() < context.num_classes):
        raise ConfigError(
            f"generation.samples: arr_1 of {path} must hold classes in [0, {context.num_classes - 1}], got "
            f"{labels.min()} to {labels.max()}"
        )
    return archive.images, labels


def _what_was_compared(context: EvaluationContext, settings: Settings, quality: SampleQuality, num_samples: int) -> str:
    pipeline = context.pipeline
    if settings.samples is not None:
        how = f"samples of {settings.samples}"
    else:
        scale = pipeline.config.default_guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        classes = f"guidance scale {scale:g}, equally many of every class"
        steps = settings.num_inference_steps or pipeline.config.default_num_inference_steps
        how = f"samples, {type(pipeline.scheduler).__name__} with {steps} steps, "
        how += "unguided" if context.num_classes is None else classes
    return (
        f"{num_samples:,} {how}; compared with {quality.reference}. Numbers of different extractors, sample counts or "
        "references do not compare, and FD-Inception-v3 alone is an FID."
    )


def _kernel_distance(
    context: EvaluationContext, settings: Settings, name: str, real: np.ndarray, generated: np.ndarray
) -> dict[str, Metric]:
    subsets, size = settings.kid_subsets, settings.kid_subset_size
    kid, deviation = kernel_distance(real, generated, subsets, size, context.settings.seed)
    return {f"KID-{name}": Metric(kid), f"KID-{name}, deviation over subsets": Metric(deviation)}


def _precision_and_recall(name: str, real: np.ndarray, generated: np.ndarray, whose: str = "") -> dict[str, Metric]:
    found = zip(("precision", "recall"), precision_and_recall(real, generated), strict=True)
    return {f"{what}-{name}{whose}": Metric(value, percent=True) for what, value in found}


def _grid(context: EvaluationContext, samples: torch.Tensor, labels: np.ndarray | None) -> Figure:
    """The first samples of the first classes, one row a class."""
    if labels is None:
        columns, names = min(SHOWN_PER_CLASS, len(samples)), None
        count = min(SHOWN_PER_CLASS, len(samples) // columns) * columns
        chosen = einops.rearrange(samples[:count], "(r k) c h w -> r k c h w", k=columns)
    else:
        ids = range(min(context.num_classes, SHOWN_CLASSES, len(samples)))
        count = min([SHOWN_PER_CLASS, *(int((labels == i).sum()) for i in ids)])
        chosen = torch.stack([samples[np.flatnonzero(labels == i)[:count]] for i in ids])
        names = [context.class_names[i] for i in ids]
    grid = plots.image_grid(einops.rearrange(chosen, "r k c h w -> r k h w c").numpy() / 255, names)
    return Figure("samples", "Samples, not chosen by hand: the first ones drawn.", grid)


def _neighbours(quality: SampleQuality, samples: torch.Tensor, generated: np.ndarray, real: np.ndarray) -> Figure:
    """Some samples, each beside the reference's images that are nearest to it: is anything merely remembered?"""
    count = min(SHOWN_NEIGHBOURS, len(real))
    # The nearest of all are the suspects, so the samples with the smallest distances are shown.
    distances, nearest = NearestNeighbors(n_neighbors=count).fit(real).kneighbors(generated)
    suspects = distances[:, 0].argsort()[:SHOWN_PER_CLASS]
    rows = []
    for suspect in suspects:
        originals = quality.reference.images(nearest[suspect]).cpu()
        rows.append(torch.cat([samples[suspect][None] / 255, originals]))
    grid = einops.rearrange(torch.stack(rows), "r k c h w -> r k h w c").numpy()
    names = [f"{distances[suspect, 0]:.3g}" for suspect in suspects]
    caption = (
        "Memorisation check: the samples closest to an image of the reference (left, with the distance in "
        f"{quality.extractors[0].name} features) and their {count} nearest images of it."
    )
    return Figure("neighbours", caption, plots.image_grid(grid, names, gap_after=1), shows_data=True)
