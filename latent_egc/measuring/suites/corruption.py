"""Suite `corruption`: the error under the 15 common corruptions at 5 severities.

Source: Hendrycks and Dietterich (ICLR 2019); the corruptions are in `corruptions.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from latent_egc.config import within
from latent_egc.data.views import central_view
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.corruptions import CATEGORIES, FUNCTIONS, SEVERITIES, corrupt, published_side
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table


@dataclass(frozen=True)
class Settings:
    """The 15 common corruptions at 5 severities."""

    num_images: int | None = within(200, 1)  # each is encoded and classified 76 times; null: all


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Error without corruption, by corruption and severity, and its mean over all of them.

    Raises:
        ConfigError: a model without classes.
    """
    context.require_classes("corruption")
    positions = context.choose(np.arange(len(context.rows)), settings.num_images)
    rows, labels = context.rows[positions], context.labels[positions, None]
    clean = _predictions(context, rows, lambda row, pixels: [pixels], "no corruption") != labels
    names = tqdm(FUNCTIONS, desc="corruptions", leave=False, disable=not context.accelerator.is_main_process)
    wrong = [_predictions(context, rows, functools.partial(_series, context, name), name) != labels for name in names]
    wrong = np.stack(wrong, axis=1)  # (images, corruptions, severities)
    kinds = np.array([kind for kind, group in CATEGORIES.items() for _ in group])
    by_kind = {kind: wrong[:, kinds == kind] for kind in CATEGORIES}

    def mean_error(errors: np.ndarray) -> Metric:
        # Images are what is resampled, each with all of its corruptions.
        return context.accuracy(errors.reshape(len(errors), -1).mean(axis=1))

    metrics = {"mean error": mean_error(wrong), "error without corruption": mean_error(clean)}
    metrics |= {f"mean error, {kind}": mean_error(errors) for kind, errors in by_kind.items()}
    curves = {name: [clean.mean(), *errors.mean(axis=(0, 1))] for name, errors in ({"all": wrong} | by_kind).items()}
    curve = plots.lines((0, *SEVERITIES), curves, "severity (0: no corruption)", "error", (0, 1.02))
    side = context.pipeline.image_size
    return SuiteResult(
        num_samples=len(rows),
        metrics=metrics,
        tables=[_table(wrong, kinds)],
        figures=[Figure("severity", "Error against severity, by the kind of corruption.", curve), _examples(context)],
        notes=[
            f"The central crop at {side} px was corrupted with the parameters published for {published_side(side)} px "
            "and kept at 8 bits a value, but not written as a JPEG file as the published sets of 64 and 224 px are.",
            "The frost is ours, a generated texture where the original has photographs: its row and the means that "
            "contain it do not compare with others' numbers.",
            "The mean error is the plain mean over corruptions and severities; it is not divided by AlexNet's errors "
            'as the "mCE" of the literature is.',
        ],
    )


def _predictions(
    context: EvaluationContext, rows: np.ndarray, variants: Callable[..., list[np.ndarray]], description: str
) -> np.ndarray:
    """(M, V) predicted classes of V variants of each image; `variants` makes them of a row and its pixels."""

    def predicted(batch: range) -> torch.Tensor:
        images = [variants(int(rows[i]), _pixels(context, int(rows[i]))) for i in batch]
        variant_images = [[Image.fromarray(pixels) for pixels in variant] for variant in zip(*images, strict=True)]
        return torch.stack([context.pipeline.classify(v).logits.argmax(dim=1) for v in variant_images], dim=1)

    return context.over_in_parts(len(rows), predicted, description).numpy()


def _pixels(context: EvaluationContext, row: int) -> np.ndarray:
    """(H, H, 3) uint8: the central crop of a validation image at the pipeline's size."""
    view = central_view(context.splits.validation.image(row), context.pipeline.image_size)
    return ((view + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _series(context: EvaluationContext, name: str, row: int, pixels: np.ndarray) -> list[np.ndarray]:
    """An image under one corruption, by severity; the draws depend on (seed, row, corruption, severity) alone."""
    number = list(FUNCTIONS).index(name)
    return [
        corrupt(pixels, name, severity, np.random.default_rng([context.settings.seed, row, number, severity]))
        for severity in SEVERITIES
    ]


def _table(wrong: np.ndarray, kinds: np.ndarray) -> Table:
    errors = np.concatenate([wrong.mean(axis=0), wrong.mean(axis=(0, 1))[None]])  # the last row: of all corruptions
    errors = np.column_stack([errors, errors.mean(axis=1)])
    rows = [
        [name, kind, *(Metric(float(error), percent=True) for error in row)]
        for name, kind, row in zip([*FUNCTIONS, "mean"], [*kinds, None], errors, strict=True)
    ]
    columns = ["corruption", "kind", *(f"severity {severity}" for severity in SEVERITIES), "mean"]
    return Table("Error by corruption and severity", columns, rows)


def _examples(context: EvaluationContext) -> Figure:
    """The first evaluated image, clean and under every corruption."""
    row = int(context.rows[0])
    pixels = _pixels(context, row)
    grid = np.stack([np.stack([pixels, *_series(context, name, row, pixels)]) for name in FUNCTIONS]) / 255
    caption = "One image without corruption and, from left to right, under each corruption at severity 1 to 5."
    return Figure("examples", caption, plots.image_grid(grid, list(FUNCTIONS), gap_after=1), shows_data=True)
