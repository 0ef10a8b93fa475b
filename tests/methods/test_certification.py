"""Clopper-Pearson against scipy, and certificates of a classifier whose true margin is known."""

import numpy as np
import pytest
import scipy.stats
import torch

from latent_egc.methods.certification import ABSTAIN, binomial_lower_bound, certificate, largest_radius


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_lower_bound_is_scipys_and_never_above_it(alpha):
    for trials in (1, 7, 100, 1000, 100_000):
        for successes in sorted({1, trials // 2 + 1, int(0.99 * trials), trials} - {0}):
            exact = scipy.stats.beta.ppf(alpha, successes, trials - successes + 1)
            found = binomial_lower_bound(successes, trials, alpha)
            assert found == pytest.approx(exact, rel=1e-8), (successes, trials)
            assert found <= exact * (1 + 1e-8)
    assert binomial_lower_bound(0, 10, alpha) == 0


def test_unanimous_votes_reach_the_largest_radius():
    """The published one: n = 100,000 at sigma 0.25 and alpha 0.001 stop short of 4 sigma."""
    expected = 0.25 * scipy.stats.norm.ppf(0.001 ** (1 / 100_000))
    assert largest_radius(100_000, 0.25, 0.001) == pytest.approx(expected, rel=1e-9)
    assert 0.94 < expected < 1
    assert largest_radius(9, 0.25, 0.001) == 0  # of nine coins all may fall alike


def test_certificates_of_a_known_probability():
    """For a linear classifier the class's probability is Phi(margin / sigma): at most alpha of the radii exceed it."""
    sigma, alpha, margin = 0.5, 0.1, 0.3
    rng, probability = np.random.default_rng(0), scipy.stats.norm.cdf(margin / sigma)
    draws = rng.binomial((20, 200), probability, (500, 2))
    votes = torch.from_numpy(np.stack([draws, (20, 200) - draws], axis=-1))
    found = [certificate(choosing, counted, sigma, alpha) for choosing, counted in votes]
    assert {label for label, _ in found} <= {0, ABSTAIN}
    exceeding = np.mean([radius > margin for _, radius in found])
    assert alpha / 3 < exceeding < alpha + 0.03  # the bound is not idle either
    assert all(radius == 0 for label, radius in found if label == ABSTAIN)
    n = 10**6
    counted = torch.tensor([round(n * probability), n - round(n * probability)])
    assert certificate(counted, counted, sigma, 0.001)[1] == pytest.approx(margin, rel=0.01)


def test_no_majority_is_no_certificate():
    assert certificate(torch.tensor([3, 2, 2]), torch.tensor([40, 35, 25]), 1.0, 0.001) == (ABSTAIN, 0.0)
