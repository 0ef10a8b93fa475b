"""Suite `pooling`: accuracy of the linear probe against the pooling of the maps."""

from latent_egc.measuring import plots
from latent_egc.measuring.probe_context import CHOICE_NOTE, ProbeContext, best
from latent_egc.measuring.results import Figure, SuiteResult, Table

Settings = None


def run(context: ProbeContext, settings: None = None) -> SuiteResult:
    """Linear-probe accuracy against p, maps pooled to p x p, at the chosen block and timestep."""
    scores = context.poolings
    metrics = {f"linear probe at {place}": context.accuracy_of(score) for place, score in scores.items()}
    chosen = best(scores)
    series = {f"{chosen.block}, timestep {chosen.timestep}": list(metrics.values())}
    picture = plots.lines([f"{p.pooling} x {p.pooling}" for p in scores], series, "map averaged to", "accuracy")
    rows = [[p.pooling, context.features("validation", p)[0].size, metrics[f"linear probe at {p}"]] for p in scores]
    return SuiteResult(
        num_samples=len(context.labels),
        metrics=metrics,
        tables=[Table("Accuracy by pooling", ["p", "features", "accuracy"], rows)],
        figures=[Figure("curve", "Linear-probe accuracy against the pooling, with 95 % intervals.", picture)],
        notes=[CHOICE_NOTE, f"Chosen: {chosen}."],
    )
