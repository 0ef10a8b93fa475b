"""Suite `generation`: how good, how varied, how faithful to their class, and how new are the samples?

Samples are rounded to 8 bits as saved images are, and compared with the training split. The same numbers of validation
images that only went through the autoencoder say what the autoencoder costs.
"""

import warnings
from dataclasses import dataclass

import einops
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from latent_egc.config import ConfigError, file_path, within
from latent_egc.data.stream import noise_generator
from latent_egc.measuring import feature_extractors, plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.feature_extractors import Extractor
from latent_egc.measuring.judges import Judge, features_of, linear_judge, load_judge, reconstructed, to_uint8
from latent_egc.measuring.results import Figure, Metric, SuiteResult


@dataclass(frozen=True)
class Settings:
    """Samples against the training split."""

    # DINOv2 of transformers (Hub id or folder), inception, or TorchScript files: programs, which can write files.
    features: tuple[str, ...] = file_path(())
    # A TorchScript classifier, images in [0, 1] to logits; null: a linear one on the features.
    judge: str | None = file_path()
    num_samples: int = within(1000, 5)
    num_reference_images: int | None = within(None, 5)  # of the training split; null: all of it
    num_judge_images: int = within(1000, 10)  # training images for the linear judge
    num_inference_steps: int = within(50, 1)
    guidance_scale: float | None = within(None, 0.0)  # null: the pipeline's own
    kid_subsets: int = within(100, 1)
    kid_subset_size: int = within(1000, 2)


SHOWN_CLASSES, SHOWN_PER_CLASS, SHOWN_NEIGHBOURS = 10, 8, 5


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """FD, KID, precision and recall by every extractor; class agreement; a grid; nearest training neighbours.

    Raises:
        ConfigError: no extractor, weights that cannot be loaded, or a judge of other classes.
    """
    device = context.accelerator.device
    if not settings.features:
        raise ConfigError(
            "generation.features must name at least one extractor: a TorchScript file, images (N, 3, H, W) in [0, 1] "
            "to features (N, D), a DINOv2 of transformers such as facebook/dinov2-base, or inception"
        )
    extractors = [feature_extractors.load_extractor(source, device) for source in settings.features]
    judge = None if settings.judge is None else load_judge(context, settings.judge, "generation.judge")
    train = context.splits.train
    reference = context.choose(np.arange(len(train)), settings.num_reference_images)
    reference = context.readable(train, reference, context.data.skip_corrupt)

    # The class of each sample, equally many of every class.
    labels = None if context.num_classes is None else np.arange(settings.num_samples) % context.num_classes
    samples = sample_images(context, settings, labels)
    decoded = reconstructed(context, context.splits.validation, context.rows)
    metrics: dict[str, Metric] = {}
    notes = [_how_sampled(context, settings, len(samples), len(reference))]
    pictures = []
    for number, extractor in enumerate(extractors):
        real = context.over_in_parts(
            len(reference),
            lambda batch, e=extractor: e(context.pixel_values(train, reference[list(batch)]) / 2 + 0.5),
            f"{extractor.name}, {train.name}",
        ).numpy()
        generated, floor = (features_of(context, extractor, images) for images in (samples, decoded))
        for what, found in (("samples", generated), ("validation images", floor)):
            few = min(len(found), len(real))
            if few <= found.shape[1]:
                message = (
                    f"FD-{extractor.name}: {few} {what} for {found.shape[1]} feature dimensions; the covariance is "
                    f"singular and the distance too large, take more than {found.shape[1]}"
                )
                warnings.warn(message, stacklevel=2)
                notes.append(message + ".")
        metrics |= _distances(context, settings, extractor.name, real, generated)
        distance = Metric(feature_extractors.frechet_distance(real, floor))
        metrics[f"FD-{extractor.name}, validation images through the autoencoder"] = distance
        if extractor.to_logits is not None:
            logits = extractor.to_logits(torch.from_numpy(generated))
            score, deviation = feature_extractors.inception_score(logits, context.settings.seed)
            metrics |= {"Inception score": Metric(score), "Inception score, deviation over parts": Metric(deviation)}
        if number == 0:
            pictures.append(_neighbours(context, extractor, samples, generated, real, reference))
    if labels is not None:
        judge = judge or linear_judge(context, extractors[0], settings.num_judge_images)
        notes += [judge.note] if judge.note else []
        metrics |= _agreement(context, judge, samples, labels, decoded)
    return SuiteResult(len(samples), metrics, figures=[_grid(context, samples, labels), *pictures], notes=notes)


def sample_images(context: EvaluationContext, settings: Settings, labels: np.ndarray | None) -> torch.Tensor:
    """(N, 3, H, W) uint8; sample i starts from noise that is a function of (seed, i)."""
    pipeline = context.pipeline
    pipeline.set_progress_bar_config(disable=True)

    def sampled(positions: range) -> torch.Tensor:
        images = pipeline(
            None if labels is None else [int(labels[i]) for i in positions],
            num_images_per_label=len(positions) if labels is None else 1,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[noise_generator(context.settings.seed, i) for i in positions],
            output_type="pt",
            batch_size=len(positions),
        ).images
        return to_uint8(images)

    return context.over_in_parts(settings.num_samples, sampled, "sample")


def _how_sampled(context: EvaluationContext, settings: Settings, num_samples: int, num_reference: int) -> str:
    pipeline = context.pipeline
    scale = pipeline.config.default_guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    guidance = "unguided" if context.num_classes is None else f"guidance scale {scale:g}, equally many of every class"
    return (
        f"{num_samples} samples, {type(pipeline.scheduler).__name__} with {settings.num_inference_steps} steps, "
        f"{guidance}; compared with {num_reference} training images. Numbers of different extractors, sample counts or "
        "references do not compare, and FD-Inception-v3 alone is an FID."
    )


def _distances(
    context: EvaluationContext, settings: Settings, name: str, real: np.ndarray, generated: np.ndarray
) -> dict[str, Metric]:
    subsets, size = settings.kid_subsets, settings.kid_subset_size
    kid, deviation = feature_extractors.kernel_distance(real, generated, subsets, size, context.settings.seed)
    precision, recall = feature_extractors.precision_and_recall(real, generated)
    return {
        f"FD-{name}": Metric(feature_extractors.frechet_distance(real, generated)),
        f"KID-{name}": Metric(kid),
        f"KID-{name}, deviation over subsets": Metric(deviation),
        f"precision-{name}": Metric(precision, percent=True),
        f"recall-{name}": Metric(recall, percent=True),
    }


def _agreement(
    context: EvaluationContext, judge: Judge, samples: torch.Tensor, labels: np.ndarray, decoded: torch.Tensor
) -> dict[str, Metric]:
    """Share of samples to which an independent judge gives the requested class, and the judge's own accuracy."""
    predicted, own = (judge.predict(images) for images in (samples, decoded))
    return {
        f"class agreement by {judge.name}": context.accuracy(predicted == labels),
        "the judge's accuracy on decoded validation images": context.accuracy(own == context.labels),
    }


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


def _neighbours(
    context: EvaluationContext,
    extractor: Extractor,
    samples: torch.Tensor,
    generated: np.ndarray,
    real: np.ndarray,
    reference: np.ndarray,
) -> Figure:
    """Some samples, each beside the training images that are nearest to it: is anything merely remembered?"""
    count = min(SHOWN_NEIGHBOURS, len(real))
    # The nearest of all are the suspects, so the samples with the smallest distances are shown.
    distances, nearest = NearestNeighbors(n_neighbors=count).fit(real).kneighbors(generated)
    suspects = distances[:, 0].argsort()[:SHOWN_PER_CLASS]
    rows = []
    for suspect in suspects:
        originals = context.pixel_values(context.splits.train, reference[nearest[suspect]]).cpu() / 2 + 0.5
        rows.append(torch.cat([samples[suspect][None] / 255, originals]))
    grid = einops.rearrange(torch.stack(rows), "r k c h w -> r k h w c").numpy()
    names = [f"{distances[suspect, 0]:.3g}" for suspect in suspects]
    caption = (
        f"Memorisation check: the samples closest to a training image (left, with the distance in {extractor.name} "
        f"features) and their {count} nearest training images."
    )
    return Figure("neighbours", caption, plots.image_grid(grid, names, gap_after=1), shows_data=True)
