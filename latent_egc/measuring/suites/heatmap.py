"""Suite `heatmap`: accuracy of the linear probe of every block at every timestep."""

from dataclasses import dataclass

import numpy as np

from latent_egc.config import within
from latent_egc.measuring import plots
from latent_egc.measuring.probe_context import CHOICE_NOTE, Place, ProbeContext, best
from latent_egc.measuring.results import Figure, Metric, SuiteResult, Table


@dataclass(frozen=True)
class Settings:
    """Accuracy of every block at every timestep; every suite's block and timestep are chosen there."""

    pooling: int = within(2, 1)


def run(context: ProbeContext, settings: Settings) -> SuiteResult:
    """Linear-probe accuracy of every block at every timestep. Source: Mukhopadhyay et al., arXiv 2307.08702."""
    scores, p = context.scores, settings.pooling
    blocks, timesteps = context.cache.blocks, context.settings.timesteps
    accuracy = np.array([[scores[Place(b, t, p)].accuracy for t in timesteps] for b in blocks])
    chosen = best(scores)
    metrics = {f"linear probe at {chosen}": context.accuracy_of(scores[chosen])}
    names = ("block", "timestep", "linear-probe accuracy (%)")
    marked = (blocks.index(chosen.block), timesteps.index(chosen.timestep))
    picture = plots.heat_map(100 * accuracy, blocks, [str(t) for t in timesteps], names, marked)
    rows = [[b, *(Metric(value, percent=True) for value in row)] for b, row in zip(blocks, accuracy, strict=True)]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics=metrics,
        tables=[Table("Accuracy by block and timestep", ["block", *(f"t = {t}" for t in timesteps)], rows)],
        figures=[Figure("map", f"Linear-probe accuracy, maps pooled to {p} x {p}; framed: chosen.", picture)],
        notes=[
            CHOICE_NOTE,
            f"Logistic regression by L-BFGS on standardised features, {len(context.train_labels)} training rows; one "
            "draw of noise an image, the same at every timestep.",
        ],
    )
