"""The suite solvers."""

import numpy as np
import pytest
from tiny_studies import measure

from latent_egc.config import ConfigError
from latent_egc.measuring.results import Metric
from latent_egc.measuring.sample_quality import Quality, SampleQuality, sample_images
from latent_egc.measuring.suites import solvers
from latent_egc.measuring.suites.solvers import Solved
from latent_egc.pipelines.schedulers import solver


def test_the_rule():
    """The fewest evaluations within 5 % of the smallest distance; of equally many the nearest."""
    ways = [Solved("UniPC", 5, 5), Solved("DDIM", 10, 10), Solved("Heun", 5, 9), Solved("UniPC", 10, 10)]
    found = [Quality(distance, 0.5, 0.5, Metric(0.9)) for distance in (12.0, 10.4, 10.6, 10.0)]
    assert solvers.chosen(ways, found) == 3
    assert solvers.chosen(ways[:3], found[:3]) == 2


def test_suite_by_hand(evaluation_context, extractor, monkeypatch):
    """A row is what its solver samples; its evaluations are the passes through the network, Heun's two a step too."""
    settings = ["solvers.num_samples=6", "solvers.num_evaluations=[1,4]", "solvers.solvers=[DDIM,Heun]"]
    context = evaluation_context(f"solvers.features=[{extractor}]", *settings)
    own, passes = context.pipeline.scheduler, []
    epsilon = context.model.epsilon
    context.model.epsilon = lambda *given, **scales: passes.append(1) or epsilon(*given, **scales)
    result = measure(solvers, context)
    (table,) = result.tables
    assert [row[:3] for row in table.rows] == [
        ["the pipeline's own", 1, 1],
        ["the pipeline's own", 4, 4],
        ["DDIM", 1, 1],
        ["DDIM", 4, 4],
        ["Heun", 1, 1],
        ["Heun", 2, 3],
    ]
    assert len(passes) == sum(row[2] for row in table.rows)
    assert context.pipeline.scheduler is own
    context.pipeline.scheduler = solver("Heun", own)
    labels = np.arange(6) % 3
    quality = SampleQuality(context, context.settings.solvers, "solvers")
    expected = quality.of(sample_images(context, 6, labels, num_inference_steps=2), labels)
    assert table.rows[5][3:5] == [expected.frechet_distance, expected.agreement]
    assert [row[-1] for row in table.rows].count("yes") == 1
    assert result.metrics["smallest FD-brightness of all"].value == min(row[3] for row in table.rows)
    assert [figure.name for figure in result.figures] == ["curves", "samples"]


def test_suite_errors(evaluation_context, extractor):
    features = f"solvers.features=[{extractor}]"
    for settings, message in (
        ([], "solvers.features must name at least one extractor"),
        ([features, "solvers.solvers=[RK4]"], "solvers.solvers: there is no solver 'RK4', only DDIM"),
        ([features, "solvers.num_evaluations=[]"], "solvers.num_evaluations must not be empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(solvers, evaluation_context(*settings))
    context = evaluation_context(features, num_classes=None, energy_channels=3)
    with pytest.raises(ConfigError, match="--suite solvers needs classes"):
        measure(solvers, context)
