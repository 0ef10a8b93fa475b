"""The suite corruption."""

import numpy as np
import pytest
from PIL import Image
from tiny_studies import measure

from latent_egc.config import ConfigError
from latent_egc.data.views import central_view
from latent_egc.measuring.corruptions import FUNCTIONS, SEVERITIES, corrupt
from latent_egc.measuring.suites import corruption


def test_suite_by_hand(evaluation_context):
    context = evaluation_context("corruption.num_images=2")
    result = measure(corruption, context)
    assert result.num_samples == 2
    assert [(figure.name, figure.shows_data) for figure in result.figures] == [("severity", False), ("examples", True)]
    rows = context.choose(context.rows, 2)
    names = [context.class_names[label] for label in context.splits.validation.labels[rows]]

    def errors(name: str | None) -> np.ndarray:
        """(5,), the share of wrong images at each severity."""
        wrong = []
        for row, true_name in zip(rows, names, strict=True):
            view = central_view(context.splits.validation.image(row), 8)
            pixels = ((view / 2 + 0.5) * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0)
            views = [pixels] * 5
            if name is not None:
                draws = [np.random.default_rng([0, row, list(FUNCTIONS).index(name), s]) for s in SEVERITIES]
                views = [corrupt(pixels, name, s, rng) for s, rng in zip(SEVERITIES, draws, strict=True)]
            predicted = context.pipeline.classify([Image.fromarray(view) for view in views]).labels
            wrong.append([top[0] != true_name for top in predicted])
        return np.mean(wrong, axis=0)

    table = {row[0]: [cell.value for cell in row[2:]] for row in result.tables[0].rows}
    expected = np.stack([errors(name) for name in FUNCTIONS])
    for name, by_severity in zip(FUNCTIONS, expected, strict=True):
        assert table[name] == pytest.approx([*by_severity, by_severity.mean()])
    assert table["mean"] == pytest.approx([*expected.mean(axis=0), expected.mean()])
    assert result.metrics["mean error"].value == pytest.approx(expected.mean())
    assert result.metrics["mean error, weather"].value == pytest.approx(expected[7:11].mean())
    assert result.metrics["error without corruption"].value == pytest.approx(errors(None)[0])
    low, high = result.metrics["mean error"].interval
    assert low <= expected.mean() <= high


def test_unlabelled_pipelines_are_refused(evaluation_context):
    with pytest.raises(ConfigError, match="--suite corruption needs classes"):
        measure(corruption, evaluation_context(num_classes=None, energy_channels=3))
