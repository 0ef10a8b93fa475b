"""Suite `solvers`: how good are samples for so many evaluations of the network, by solver?

A scheduler's step is one evaluation, a forward and a backward pass; Heun's takes two, but for its last. The rule that
chooses: the fewest evaluations whose Frechet distance is at most 5 % above the smallest of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin

from latent_egc.config import ConfigError, within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table
from latent_egc.measuring.sample_quality import InstrumentSettings, Quality, SampleQuality, sample_images
from latent_egc.pipelines.schedulers import SOLVERS, solver, steps_within

TOLERANCE = 0.05  # of the smallest Frechet distance, by which the chosen one's may be larger
OWN = "the pipeline's own"


@dataclass(frozen=True)
class Settings(InstrumentSettings):
    """Every solver with every number of evaluations, and the pipeline's own scheduler as it is."""

    solvers: tuple[str, ...] = tuple(SOLVERS)
    num_evaluations: tuple[int, ...] = within((5, 8, 10, 15, 20, 30, 50), 1)
    guidance_scale: float | None = within(None, 0.0)  # null: the pipeline's own
    guidance_interval: tuple[float, float] = within((0.0, 1.0), 0.0, 1.0)
    num_samples: int = within(500, 5)  # of each


class Solved(NamedTuple):
    """One way to sample."""

    solver: str
    num_inference_steps: int
    num_evaluations: int


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Frechet distance and class agreement of every solver and number of evaluations; the chosen one; the curves.

    Raises:
        ConfigError: no classes, no or an unknown solver, no number of evaluations, or as `SampleQuality`.
    """
    context.require_classes("solvers")
    pipeline = context.pipeline
    own = pipeline.scheduler
    schedulers = _schedulers(settings, own)
    quality = SampleQuality(context, settings, "solvers")
    labels = np.arange(settings.num_samples) % context.num_classes
    ways: list[Solved] = []
    found: list[Quality] = []
    shown: list[torch.Tensor] = []
    try:
        for name, pipeline.scheduler in schedulers.items():
            for steps, evaluations in steps_within(pipeline.scheduler, settings.num_evaluations).items():
                samples = sample_images(
                    context,
                    len(labels),
                    labels,
                    f"{name}, {evaluations} evaluations",
                    num_inference_steps=steps,
                    guidance_scale=settings.guidance_scale,
                    guidance_interval=settings.guidance_interval,
                )
                ways.append(Solved(name, steps, evaluations))
                found.append(quality.of(samples, labels))
                shown.append(samples[: min(context.num_classes, 10)])
    finally:
        pipeline.scheduler = own
    best = chosen(ways, found)
    name = quality.extractors[0].name
    metrics = {
        "chosen number of evaluations": Metric(ways[best].num_evaluations),
        f"FD-{name}": Metric(found[best].frechet_distance),
        f"smallest FD-{name} of all": Metric(min(one.frechet_distance for one in found)),
        f"class agreement by {quality.judge.name}": found[best].agreement,
        "the judge's accuracy on decoded validation images": quality.judge_accuracy,
    }
    picture = plots.image_grid(
        torch.stack(shown).permute(0, 1, 3, 4, 2).numpy() / 255, [f"{w.solver}, {w.num_evaluations}" for w in ways]
    )
    figures = [
        Figure("curves", "Samples against the evaluations of the network that they cost.", _curves(ways, found, best)),
        Figure("samples", "The first samples of the first classes, from the same noise.", picture),
    ]
    scale = pipeline.config.default_guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    how = f"{len(labels)} samples each, guidance scale {scale:g} from {settings.guidance_interval}"
    notes = [_choice(ways[best], schedulers), *quality.notes(how, len(labels))]
    context.accelerator.print(notes[0])
    return SuiteResult(len(labels) * len(ways), metrics, [_table(ways, found, best)], figures, notes)


def _schedulers(settings: Settings, own: SchedulerMixin) -> dict[str, SchedulerMixin]:
    """By name. Raises ConfigError, naming the key, where there is nothing to compare or no such solver."""
    for key in ("solvers", "num_evaluations"):
        if not getattr(settings, key):
            raise ConfigError(f"solvers.{key} must not be empty")
    try:
        return {OWN: own, **{name: solver(name, own) for name in settings.solvers}}
    except ValueError as error:
        raise ConfigError(f"solvers.solvers: {error}") from error


def chosen(ways: Sequence[Solved], found: Sequence[Quality]) -> int:
    """The number of the way that the rule chooses; of equally many evaluations the one with the smallest distance."""
    bound = (1 + TOLERANCE) * min(one.frechet_distance for one in found)
    good = [i for i, one in enumerate(found) if one.frechet_distance <= bound]
    return min(good, key=lambda i: (ways[i].num_evaluations, found[i].frechet_distance))


def _choice(way: Solved, schedulers: dict[str, SchedulerMixin]) -> str:
    """Which way the rule chooses, and how it becomes the default."""
    text = (
        f"Chosen: {way.solver} with {way.num_evaluations} evaluations, the fewest whose Frechet distance is within "
        f"{100 * TOLERANCE:g} % of the smallest. To make it the pipeline's own: "
    )
    if way.solver != OWN:
        text += f"pipeline.scheduler = solver({way.solver!r}, pipeline.scheduler) of latent_egc.pipelines.schedulers, "
    steps = f"pipeline.register_to_config(default_num_inference_steps={way.num_inference_steps})"
    return f"{text}{steps}, pipeline.save_pretrained(FOLDER)."


def _table(ways: Sequence[Solved], found: Sequence[Quality], best: int) -> Table:
    columns = ["solver", "steps", "evaluations", "Frechet distance", "class agreement", "precision", "recall", "chosen"]
    rows = [
        [
            *way,
            one.frechet_distance,
            one.agreement,
            Metric(one.precision, percent=True),
            Metric(one.recall, percent=True),
            "yes" if i == best else None,
        ]
        for i, (way, one) in enumerate(zip(ways, found, strict=True))
    ]
    return Table("Solvers by evaluations of the network", columns, rows)


def _curves(ways: Sequence[Solved], found: Sequence[Quality], best: int) -> bytes:
    """A panel for the distance, one for the agreement."""
    quantities = {
        "Frechet distance": [one.frechet_distance for one in found],
        "class agreement": [one.agreement.value for one in found],
    }
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for quantity, values in quantities.items():
        curves[quantity] = {}
        for way, value in zip(ways, values, strict=True):
            x, y = curves[quantity].setdefault(way.solver, ([], []))
            x.append(way.num_evaluations)
            y.append(value)
    marked = {quantity: (ways[best].num_evaluations, values[best]) for quantity, values in quantities.items()}
    return plots.panels(curves, "evaluations of the network", marked, logarithmic=("Frechet distance",))
