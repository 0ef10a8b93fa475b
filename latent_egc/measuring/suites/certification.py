"""Suite `certification`: the accuracy that no change of the pixels within a radius can take away.

By randomised smoothing, see methods/certification.py. Other than under an attack, which finds what it finds, these
numbers hold against every change, each with the confidence 1 - alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from latent_egc.config import ConfigError, within
from latent_egc.data.stream import noise_generator
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Curves, Figure, Metric, SuiteResult, Table
from latent_egc.methods.certification import largest_radius


@dataclass(frozen=True)
class Settings:
    """Votes over noised copies of the images."""

    sigmas: tuple[float, ...] = within((0.12, 0.25, 0.5), 1e-6)  # of the noise, in units of pixels in [0, 1]
    noise: Literal["pixels", "latents"] = "pixels"  # latents: sigmas and radii are of scaled latents
    num_images: int | None = within(None, 1)  # null: 200 without an autoencoder, 50 through one
    n: int | None = within(None, 1)  # counted votes an image; null: 10,000 without an autoencoder, 1,000 through one
    n0: int = within(100, 1)  # votes before them, which choose the class
    alpha: float = within(0.001, 1e-12, 0.5)  # the probability that an image's certificate is wrong


RADII = (0.0, 0.25, 0.5, 0.75)
# ResNet-110 trained on CIFAR-10 with that noise, n = 100,000, alpha = 0.001; the shares at the last three radii.
PUBLISHED_SIGMA, PUBLISHED_N, PUBLISHED = 0.25, 100_000, (0.60, 0.43, 0.27)
POINTS = 41  # of the curves


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Certified accuracy against the radius for each sigma, and how large a radius so many votes can have.

    Raises:
        ConfigError: a model without classes, or a sigma or kind of noise that this pipeline has not.
    """
    context.require_classes("certification")
    in_pixels = context.pipeline.vae is None
    num_images, n = settings.num_images or (200 if in_pixels else 50), settings.n or (10_000 if in_pixels else 1000)
    positions = context.choose(np.arange(len(context.rows)), num_images)
    _check(context, settings)
    right = (context.logits.argmax(dim=1).numpy() == context.labels)[positions]
    found, largest = {}, {}
    for sigma in settings.sigmas:
        labels, radii = _certified(context, settings, positions, sigma, n).T
        # Below every radius where the class is not the right one.
        found[sigma] = np.where(labels == context.labels[positions], radii, -1), (labels < 0).mean()
        largest[sigma] = largest_radius(n, sigma, settings.alpha)
    space = "pixels in [0, 1]" if settings.noise == "pixels" else "scaled latents, not of pixels"
    metrics = {"accuracy without noise": context.accuracy(right)}
    for sigma, (radii, _) in found.items():
        metrics |= {
            f"certified accuracy at radius {radius:g}, sigma {sigma:g}": context.accuracy(radii >= radius)
            for radius in RADII
            if radius <= largest[sigma]
        }
        metrics[f"largest radius that n = {n:,} allows, sigma {sigma:g}"] = Metric(largest[sigma])
    return SuiteResult(
        num_samples=len(positions),
        metrics=metrics,
        tables=[_table(settings, n, metrics, {s: share for s, (_, share) in found.items()}, largest)],
        figures=[_curves(context, {s: radii for s, (radii, _) in found.items()}, largest, metrics, space)],
        notes=[
            f"Noise, sigma and radii in l2 of {space}. {len(positions)} images, {settings.n0} votes that choose the "
            f"class and n = {n:,} that are counted; each certificate is wrong with probability {settings.alpha:g} at "
            "most. A radius beyond the largest that n allows needs more votes, not another network.",
            "Published: Cohen et al. (ICML 2019), a ResNet-110 trained on CIFAR-10 with noise of that sigma.",
        ],
    )


def _check(context: EvaluationContext, settings: Settings) -> None:
    """Raises ConfigError on what the pipeline cannot certify, before hours are spent on what it can."""
    size = context.pipeline.image_size
    for sigma in settings.sigmas:
        try:
            context.pipeline.certify(torch.zeros(3, size, size), sigma, n0=1, n=1, noise=settings.noise)
        except ValueError as error:
            raise ConfigError(
                f"certification.sigmas={sigma:g}, certification.noise={settings.noise}: {error}"
            ) from error


def _certified(
    context: EvaluationContext, settings: Settings, positions: np.ndarray, sigma: float, n: int
) -> np.ndarray:
    """(N, 2): label, -1 where it abstains, and radius of each of the images."""
    pipeline, options = context.pipeline, {"alpha": settings.alpha, "noise": settings.noise}
    options |= {"n0": settings.n0, "n": n, "batch_size": context.settings.batch_size}
    pipeline.set_progress_bar_config(disable=not context.accelerator.is_main_process, leave=False, desc="votes")

    def certificates(batch: range) -> torch.Tensor:
        rows = context.rows[positions[list(batch)]]
        images = context.pixel_values(context.splits.validation, rows) / 2 + 0.5
        generators = [noise_generator(context.settings.seed, int(row)) for row in rows]
        output = pipeline.certify(images, sigma, generator=generators, **options)
        return torch.stack([output.label_ids, output.radius], dim=1)

    return context.over_in_parts(len(positions), certificates, f"sigma {sigma:g}").numpy()


def _table(
    settings: Settings,
    n: int,
    metrics: Mapping[str, Metric],
    abstained: Mapping[float, float],
    largest: Mapping[float, float],
) -> Table:
    """A row a sigma, and the published one."""
    rows = []
    for sigma, share in abstained.items():
        shares = [metrics.get(f"certified accuracy at radius {radius:g}, sigma {sigma:g}") for radius in RADII]
        rows.append([f"{sigma:g}", f"{n:,}", *shares, Metric(share, percent=True), Metric(largest[sigma])])
    if settings.noise == "pixels":
        shares = [None, *(Metric(share, percent=True) for share in PUBLISHED)]
        limit = Metric(largest_radius(PUBLISHED_N, PUBLISHED_SIGMA, 0.001))
        rows.append([f"{PUBLISHED_SIGMA:g}, published", f"{PUBLISHED_N:,}", *shares, None, limit])
    columns = ["sigma", "n", *(f"radius {radius:g}" for radius in RADII), "abstained", "largest radius by n"]
    return Table("Certified accuracy", columns, rows)


def _curves(
    context: EvaluationContext,
    found: Mapping[float, np.ndarray],
    largest: Mapping[float, float],
    metrics: Mapping[str, Metric],
    space: str,
) -> Figure:
    """Certified accuracy against the radius, a curve a sigma."""
    grid = np.linspace(0, 1.05 * max(largest.values()), POINTS)
    shares = {sigma: [context.accuracy(radii >= radius) for radius in grid] for sigma, radii in found.items()}
    series = {f"sigma {sigma:g}, at most {largest[sigma]:.2f}": points for sigma, points in shares.items()}
    level = (metrics["accuracy without noise"].value, "without noise")
    x_name, y_name = f"l2 radius, {space}", "certified accuracy"
    picture = plots.lines(grid, series, x_name, y_name, (0, 1.02), level)
    caption = "Share of images that are classified right whatever is added to them within the radius."
    curves = Curves(x_name, y_name, {f"sigma {sigma:g}": (grid.tolist(), points) for sigma, points in shares.items()})
    return Figure("certified_accuracy", caption, picture, curves=(curves,))
