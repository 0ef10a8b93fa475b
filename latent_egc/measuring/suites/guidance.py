"""Suite `guidance`: what each scale and interval of the guidance buys in class agreement, and costs in variety.

The rule that chooses one: of the settings whose samples the judge gives the class that was asked for in at least 90 %
as many cases as it recognises real images, the one with the largest F-score of precision and recall. Where none does,
the one of the largest agreement. Selection among candidates stands beside it: it costs so many times as much.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from latent_egc.config import ConfigError, within
from latent_egc.measuring import plots
from latent_egc.measuring.context import EvaluationContext
from latent_egc.measuring.results import Curves, Figure, Metric, SuiteResult, Table
from latent_egc.measuring.sample_quality import InstrumentSettings, Quality, SampleQuality, sample_images
from latent_egc.pipelines.sampling_checks import check_guidance

AGREEMENT_SHARE = 0.9  # of the judge's own accuracy, which the chosen setting's agreement must reach


@dataclass(frozen=True)
class Settings(InstrumentSettings):
    """Every scale with every interval."""

    guidance_scales: tuple[float, ...] = within((1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 0.0)
    guidance_intervals: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.1, 0.8), (0.4, 1.0))
    classifier_free_scale: float = 1.0  # of all of them; only with a class embedding
    num_candidates: int = within(4, 1)  # drawn at the first scale, guided everywhere; 1: no selection
    select_by: tuple[Literal["classifier", "density", "both"], ...] = ("classifier", "density", "both")
    num_samples: int = within(500, 5)  # of each setting
    num_inference_steps: int | None = within(None, 1)  # null: the pipeline's own


class Guided(NamedTuple):
    """One way to sample."""

    guidance_scale: float
    guidance_interval: tuple[float, float]
    num_candidates: int = 1
    select_by: str = "classifier"

    @property
    def where(self) -> str:
        """The interval, and the selection if there is one."""
        interval = "everywhere" if self.guidance_interval == (0, 1) else "{:g} to {:g}".format(*self.guidance_interval)
        return (
            interval if self.num_candidates == 1 else f"{interval}, best of {self.num_candidates} by {self.select_by}"
        )

    @property
    def name(self) -> str:
        """Both."""
        return f"scale {self.guidance_scale:g}, {self.where}"


def run(context: EvaluationContext, settings: Settings) -> SuiteResult:
    """Agreement, precision, recall and Frechet distance of every setting; the chosen one; the curves.

    Raises:
        ConfigError: no classes or scales, a scale or interval that the pipeline refuses, or as `SampleQuality`.
    """
    context.require_classes("guidance")
    ways = _ways(context, settings)
    quality = SampleQuality(context, settings, "guidance")
    labels = np.arange(settings.num_samples) % context.num_classes
    found: list[Quality] = []
    shown: list[torch.Tensor] = []
    for way in ways:
        samples = sample_images(
            context,
            len(labels),
            labels,
            way.name,
            num_inference_steps=settings.num_inference_steps,
            classifier_free_scale=settings.classifier_free_scale,
            **way._asdict(),
        )
        found.append(quality.of(samples, labels))
        shown.append(samples[: min(context.num_classes, 10)])
    own = quality.judge_accuracy
    alone = [i for i, way in enumerate(ways) if way.num_candidates == 1]
    best = alone[chosen([found[i] for i in alone], own.value)]
    name = quality.extractors[0].name
    metrics = {
        "chosen guidance scale": Metric(ways[best].guidance_scale),
        "chosen interval, start": Metric(ways[best].guidance_interval[0]),
        "chosen interval, stop": Metric(ways[best].guidance_interval[1]),
        f"class agreement by {quality.judge.name}": found[best].agreement,
        f"precision-{name}": Metric(found[best].precision, percent=True),
        f"recall-{name}": Metric(found[best].recall, percent=True),
        f"FD-{name}": Metric(found[best].frechet_distance),
        "the judge's accuracy on decoded validation images": own,
    }
    picture = plots.image_grid(
        torch.stack(shown).permute(0, 1, 3, 4, 2).numpy() / 255, [f"{w.guidance_scale:g}, {w.where}" for w in ways]
    )
    curves, caption = _curves(ways, found), "What each scale buys and costs, by the interval it acts in."
    figures = [
        Figure("curves", caption, _panels(curves, ways[best], found[best]), curves=curves),
        Figure("samples", "The first samples of the first classes at each setting, from the same noise.", picture),
    ]
    steps = settings.num_inference_steps or context.pipeline.config.default_num_inference_steps
    sampler = f"{type(context.pipeline.scheduler).__name__} with {steps} steps"
    notes = [
        _choice(ways[best], found[best], own),
        *quality.notes(f"{len(labels)} samples each, {sampler}", len(labels)),
    ]
    context.accelerator.print(notes[0])
    return SuiteResult(len(labels) * len(ways), metrics, [_table(ways, found, best)], figures, notes)


def _ways(context: EvaluationContext, settings: Settings) -> list[Guided]:
    """Every interval with every scale, and selection. Raises ConfigError, naming the key, on what cannot be sampled."""
    for key in ("guidance_scales", "guidance_intervals"):
        if not getattr(settings, key):
            raise ConfigError(f"guidance.{key} must not be empty")
    pairs = list(itertools.product(settings.guidance_intervals, settings.guidance_scales))
    label = torch.zeros(1, dtype=torch.long)
    for interval, scale in pairs:
        try:
            check_guidance(context.model, label, scale, settings.classifier_free_scale, interval)
        except ValueError as error:
            raise ConfigError(f"guidance: {error}") from error
    selections = settings.select_by if settings.num_candidates > 1 else ()
    return [
        *(Guided(scale, interval) for interval, scale in pairs),
        *(Guided(settings.guidance_scales[0], (0.0, 1.0), settings.num_candidates, by) for by in selections),
    ]


def chosen(found: Sequence[Quality], judge_accuracy: float) -> int:
    """The number of the setting that the rule chooses, the first of equals; `judge_accuracy` is a share."""
    faithful = [i for i, one in enumerate(found) if one.agreement.value >= AGREEMENT_SHARE * judge_accuracy]
    if faithful:
        return max(faithful, key=lambda i: found[i].f_score)
    return max(range(len(found)), key=lambda i: found[i].agreement.value)


def _choice(way: Guided, quality: Quality, own: Metric) -> str:
    """Which setting the rule chooses, why, and how it becomes the default."""
    needed = AGREEMENT_SHARE * own.value
    if quality.agreement.value >= needed:
        why = (
            f"the largest F-score of precision and recall, {quality.f_score:.3f}, of the settings whose class "
            f"agreement is at least {100 * needed:.1f} % ({100 * AGREEMENT_SHARE:g} % of the judge's own accuracy)"
        )
    else:
        why = f"the largest class agreement: none reaches {100 * needed:.1f} %, 90 % of the judge's own accuracy"
    call = "" if way.guidance_interval == (0, 1) else f", and guidance_interval={way.guidance_interval} in each call"
    return (
        f"Chosen: {way.name}; {why}. To make it the pipeline's own: pipeline.register_to_config("
        f"default_guidance_scale={way.guidance_scale:g}), pipeline.save_pretrained(FOLDER){call}."
    )


def _table(ways: Sequence[Guided], found: Sequence[Quality], best: int) -> Table:
    names = "scale, guided, candidates, class agreement, precision, recall, F-score, Frechet distance, chosen"
    rows = [
        [
            way.guidance_scale,
            way.where,
            way.num_candidates,
            one.agreement,
            Metric(one.precision, percent=True),
            Metric(one.recall, percent=True),
            one.f_score,
            one.frechet_distance,
            "yes" if i == best else None,
        ]
        for i, (way, one) in enumerate(zip(ways, found, strict=True))
    ]
    return Table("Guidance, and selection among candidates", names.split(", "), rows)


QUANTITIES: dict[str, Callable[[Quality], float | Metric]] = {
    "class agreement": lambda one: one.agreement,
    "precision": lambda one: one.precision,
    "recall": lambda one: one.recall,
}


def _curves(ways: Sequence[Guided], found: Sequence[Quality]) -> tuple[Curves, ...]:
    """Of each quantity, a curve for each interval; selection, at one scale, is a point."""
    curves = []
    for quantity, value in QUANTITIES.items():
        series: dict[str, tuple[list[float], list[float | Metric]]] = {}
        for way, one in zip(ways, found, strict=True):
            x, y = series.setdefault(way.where, ([], []))
            x.append(way.guidance_scale)
            y.append(value(one))
        curves.append(Curves("guidance scale", quantity, series))
    return tuple(curves)


def _panels(curves: Sequence[Curves], best: Guided, its_quality: Quality) -> bytes:
    """A panel for each quantity, the chosen setting marked."""
    heights = {quantity: value(its_quality) for quantity, value in QUANTITIES.items()}
    heights["class agreement"] = its_quality.agreement.value
    marked = {quantity: (best.guidance_scale, height) for quantity, height in heights.items()}
    return plots.panels({one.y_name: one.series for one in curves}, curves[0].x_name, marked)
