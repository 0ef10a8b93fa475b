"""Metrics and their bootstrap intervals."""

import numpy as np
import pytest

from latent_egc.measuring.results import bootstrapped


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    sample = np.random.default_rng(0).random(400)
    metric = bootstrapped(np.mean, sample, num_resamples=4000, seed=0)
    error = 1.96 * sample.std() / 20
    assert metric.value == sample.mean()
    assert metric.interval == pytest.approx((sample.mean() - error, sample.mean() + error), abs=0.1 * error)
    assert bootstrapped(np.mean, sample[:1], num_resamples=10, seed=0).interval is None


def test_bootstrap_keeps_rows_together():
    x = np.random.default_rng(0).random(50)
    metric = bootstrapped(lambda a, b: float(np.abs(a - b[:, 0]).max()), x, x[:, None], num_resamples=10, seed=0)
    assert metric.interval == (0, 0)


def test_bootstrap_keeps_strata():
    """The mean within each stratum is constant, so every resample has the same mean."""
    strata = np.array([0] * 30 + [1] * 3)
    metric = bootstrapped(np.mean, strata.astype(float), num_resamples=50, seed=0, strata=strata)
    assert metric.interval == pytest.approx((1 / 11, 1 / 11))
