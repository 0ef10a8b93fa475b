"""The suite heads."""

import numpy as np
import pytest
from tiny_studies import TINY_HEADS, measure, values

from latent_egc.measuring.probe_context import Place
from latent_egc.measuring.suites import heads


def test_heads_report_their_predictions(probe_context):
    probe = probe_context("block=mid.0", "timestep=90", "pooling=2", *TINY_HEADS)
    found = values(measure(heads, probe))
    assert list(found) == ["linear, L-BFGS", "3-NN", "linear, SGD", "MLP", "CNN", "attention"]
    train, validation = (array.reshape(len(array), -1) for array in probe.standardised(Place("mid.0", 90, 2)))
    train, validation = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, validation))
    nearest = np.argsort(-(validation @ train.T), axis=1)[:, :3]
    votes = np.array([np.bincount(probe.train_labels[row], minlength=3).argmax() for row in nearest])
    assert found["3-NN"] == pytest.approx((votes == probe.labels).mean())
