"""Suite `composition`: are samples of two classes at once both, and samples of "not this class" not that class?

An independent judge ranks the classes of each sample; with a corrector between the steps and without.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from latent_egc.config import ConfigError, file_path, within
from latent_egc.data.stream import noise_generator
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.judges import load_judge, pixel_judge, reconstructed, to_uint8
from latent_egc.measuring.results import Figure, Metric, SuiteResult
from latent_egc.methods.correctors import Corrector


@dataclass(frozen=True)
class Settings:
    """AND and NOT of classes."""

    all_of: tuple[str, ...] | None = None  # names that each sample is to be at once; null: the first two
    none_of: tuple[str, ...] | None = None  # names that no sample is to be; null: the first
    # A TorchScript classifier, images in [0, 1] to logits; null: a support vector machine on the images' pixels.
    judge: str | None = file_path()
    judge_size: int | None = within(None, 1)  # of the images that it knows, pixels; null: the pipeline's
    num_judge_images: int = within(1000, 10)  # training images for that machine
    num_samples: int = within(200, 5)  # of each kind
    num_inference_steps: int | None = within(None, 1)  # null: the pipeline's own
    guidance_scale: float | None = within(None, 0.0)  # null: the pipeline's own
    corrector: Literal["ula", "mala", "hmc"] = "mala"
    num_corrector_steps: int = within(4, 1)  # of its chain at each noise level


SHOWN = 12


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Shares of samples whose likeliest classes are those of AND, and that are judged to be one of NOT's; a grid.

    Raises:
        ConfigError: a pipeline without classes, unknown names, or a judge of other classes.
    """
    context.require_classes("composition")
    scale = settings.guidance_scale
    if scale is None:
        scale = context.pipeline.config.default_guidance_scale
    if scale == 0:
        raise ConfigError("composition.guidance_scale must be positive, a density to the power 0 is none, got 0")
    names = context.class_names
    both, excluded = (
        names[:count] if asked is None else list(asked)
        for asked, count in ((settings.all_of, 2), (settings.none_of, 1))
    )
    for key, asked in (("all_of", both), ("none_of", excluded)):
        if not asked or not set(asked) < set(names):
            raise ConfigError(f"composition.{key} must be some of the classes {', '.join(names)}, got {asked}")
    if settings.judge is None:
        judge = pixel_judge(context, settings.num_judge_images)
    else:
        judge = load_judge(context, settings.judge, "composition.judge", settings.judge_size)
    steps = settings.num_inference_steps or context.pipeline.config.default_num_inference_steps
    corrector = Corrector(settings.corrector, num_steps=settings.num_corrector_steps)
    conjunction, negation = " AND ".join(both), "NOT " + ", ".join(excluded)
    pipeline = context.pipeline
    all_of, none_of = (
        {"potential": pipeline.composed_potential(guidance_scale=scale, **classes)}
        for classes in ({"all_of": both}, {"none_of": excluded})
    )
    kinds: dict[str, dict[str, Any]] = {
        both[0]: {"class_labels": both[0], "guidance_scale": scale},
        conjunction: all_of,
        f"{conjunction}, {corrector.kind}": all_of | {"corrector": corrector},
        "unlabelled": {},
        negation: none_of,
        f"{negation}, {corrector.kind}": none_of | {"corrector": corrector},
    }
    metrics: dict[str, Metric] = {}
    shown, wanted = [], {names.index(name) for name in both}
    for position, (kind, options) in enumerate(kinds.items()):
        samples, acceptance = _samples(context, settings, kind, options)
        ranked = judge.scores(samples).argsort(axis=1)[:, ::-1]
        if position < 3:
            found = np.array([set(row[: len(both)]) == wanted for row in ranked.tolist()])
            metrics[f"likeliest are {' and '.join(both)}: {kind}"] = context.accuracy(found)
        else:
            found = np.isin(ranked[:, 0], [names.index(name) for name in excluded])
            metrics[f"judged {' or '.join(excluded)}: {kind}"] = context.accuracy(found)
        if "corrector" in options:
            metrics[f"acceptance rate: {kind}"] = Metric(float(acceptance.nanmean()), percent=True)
        shown.append(samples[:SHOWN].movedim(1, -1))
    decoded = reconstructed(context, context.splits.validation, context.rows)
    correct = judge.predict(decoded) == context.labels
    metrics["the judge's accuracy on decoded validation images"] = context.accuracy(correct)
    caption = f"Samples, the first ones drawn, from the same starting noise in every row; guidance scale {scale:g}."
    grid = plots.image_grid(torch.stack(shown).numpy() / 255, list(kinds))
    notes = [
        f"{settings.num_samples} samples of each kind, {type(pipeline.scheduler).__name__} with "
        f"{steps} steps, guidance scale {scale:g}, {corrector.num_steps} steps of "
        f"{corrector.kind} at each noise level where there is a corrector. The judge is {judge.name}.",
        *([judge.note] if judge.note else []),
    ]
    return SuiteResult(len(kinds) * settings.num_samples, metrics, [], [Figure("samples", caption, grid)], notes)


def _samples(
    context: EvaluationContext, settings: Settings, kind: str, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, H, W) uint8, and acceptance rates (N, L), L = 1 and NaN without corrector.

    Sample i is a function of (seed, i).
    """
    context.pipeline.set_progress_bar_config(disable=True)
    labels = options.get("class_labels")

    def sampled(positions: range) -> torch.Tensor:
        output = context.pipeline(
            **options | ({} if labels is None else {"class_labels": [labels] * len(positions)}),
            num_images_per_label=len(positions) if labels is None else 1,
            num_inference_steps=settings.num_inference_steps,
            generator=[noise_generator(context.settings.seed, i) for i in positions],
            output_type="pt",
            batch_size=len(positions),
        )
        rates = output.acceptance_rates
        mean = torch.full((len(positions), 1), float("nan")) if rates is None else rates.nanmean(dim=1, keepdim=True)
        # One tensor a row is what the processes gather.
        return torch.cat([to_uint8(output.images).flatten(1).float().cpu(), mean], dim=1)

    rows = context.over_in_parts(settings.num_samples, sampled, f"sample, {kind}")
    size = context.pipeline.image_size
    return rows[:, :-1].to(torch.uint8).unflatten(1, (3, size, size)), rows[:, -1:]
