"""The suite classification."""

import numpy as np
import pytest
import sklearn.metrics
from tiny_studies import FAST_EVALUATION, measure

from latent_egc.measuring.suites import classification


def test_classification_is_scikit_learns(evaluation_context):
    context = evaluation_context(*FAST_EVALUATION)
    logits, labels = context.logits.numpy(), context.labels
    result = measure(classification, context)
    assert result.num_samples == 7
    accuracy = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert result.metrics["top-1 accuracy"].value == pytest.approx(accuracy)
    assert "top-5 accuracy" not in result.metrics  # of 3 classes
    recall = sklearn.metrics.recall_score(labels, logits.argmax(1), average=None)
    precision = sklearn.metrics.precision_score(labels, logits.argmax(1), average=None, zero_division=np.nan)
    for row, r, p in zip(result.tables[0].rows, recall, precision, strict=True):
        assert row[2].value == pytest.approx(r)
        assert (row[4].value if row[4] else np.nan) == pytest.approx(p, nan_ok=True)
