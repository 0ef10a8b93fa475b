"""The suite calibration."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
from tiny_studies import measure

from latent_egc.measuring.suites import calibration
from latent_egc.measuring.suites.calibration import fit_temperature, reliability_bins


@pytest.fixture
def logits_and_labels():
    """500 images, 7 classes; the logits know something of the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500)
    return 2 * rng.standard_normal((500, 7)) + 2 * np.eye(7)[labels], labels


def test_calibration_equals_scikit_learn_and_arithmetic(evaluation_context, logits_and_labels):
    context = evaluation_context()
    logits, labels = logits_and_labels
    context.logits, context.labels = torch.from_numpy(logits), labels
    result = measure(calibration, context)
    fitted, judged = np.split(np.random.default_rng(0).permutation(500), 2)
    temperature = result.metrics["temperature"].value
    assert temperature == fit_temperature(logits[fitted], labels[fitted])
    for variant, scale in (("as trained", 1), ("temperature scaled", temperature)):
        p, y = scipy.special.softmax(logits[judged] / scale, axis=1), labels[judged]
        confidence, correct = p.max(1), p.argmax(1) == y
        ece = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence > low) & (confidence <= low + 1 / 15)
            if inside.any():
                ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
        found = {name.split(",")[0]: m.value for name, m in result.metrics.items() if name.endswith(variant)}
        assert found == pytest.approx(
            {
                "NLL (nats)": sklearn.metrics.log_loss(y, p, labels=range(7)),
                "Brier score": ((p - np.eye(7)[y]) ** 2).sum(axis=1).mean(),
                "ECE (15 bins)": ece,
            },
            rel=1e-5,
        )
    assert result.num_samples == 250


def test_a_temperature_without_optimum_is_called_so(evaluation_context):
    context = evaluation_context()
    for right in (False, True):
        labels = torch.from_numpy(context.labels if right else (context.labels + 1) % 3)
        context.__dict__["logits"] = torch.nn.functional.one_hot(labels, 3).float()
        assert any("it has no optimum" in note for note in measure(calibration, context).notes) == right


def test_temperature_is_recovered():
    """Labels drawn from softmax(logits / 2.5)."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20000, 4))
    labels = (scipy.special.softmax(logits / 2.5, axis=1).cumsum(1) < rng.random((20000, 1))).sum(1).clip(max=3)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)


def test_reliability_bins_count_every_image(logits_and_labels):
    confidence, accuracy, count = reliability_bins(*logits_and_labels, 10)
    assert count.sum() == 500
    full = count > 0
    assert (accuracy[full] @ count[full]) / 500 == pytest.approx(
        (logits_and_labels[0].argmax(1) == logits_and_labels[1]).mean()
    )
    edges = np.arange(11) / 10
    assert np.all((edges[:-1][full] <= confidence[full]) & (confidence[full] <= edges[1:][full]))
