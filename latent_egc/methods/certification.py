"""Randomised smoothing: the class that most noised copies of an input are given, and how far that is certain to hold.

Whatever a classifier is, the class that it most probably gives to x + sigma eps, eps ~ N(0, I), cannot change within an
l2 distance of sigma Phi^-1(p) of x, if p bounds that class's probability from below. The probability is bounded by
counting votes: a few choose the class, others, which it was not chosen by, say how often it comes.
Source: Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing" (ICML 2019).
"""

from statistics import NormalDist

import torch

# In place of a label, where the votes do not tell one class from the others.
ABSTAIN = -1


def binomial_lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's bound: with confidence 1 - alpha a success is at least so probable.

    It is the p at which `successes` or more have the probability alpha, by bisection over the binomial distribution's
    tail; never above the exact one.

    Args:
        successes: in [0, trials].
        trials: at least 1.
        alpha: in (0, 1).
    """
    if successes == 0:
        return 0.0
    counts = torch.arange(successes, trials + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(trials + 1.0, dtype=torch.float64))
    ways = ways - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    low, high = 0.0, 1.0
    for _ in range(50):  # to 1e-15
        p = torch.tensor((low + high) / 2, dtype=torch.float64)
        tail = (ways + counts * p.log() + (trials - counts) * torch.log1p(-p)).logsumexp(dim=0).exp()
        low, high = (low, float(p)) if tail > alpha else (float(p), high)
    return low


def certificate(
    choosing_votes: torch.Tensor, counted_votes: torch.Tensor, sigma: float, alpha: float
) -> tuple[int, float]:
    """The smoothed classifier's class and the l2 radius within which, with confidence 1 - alpha, it does not change.

    Args:
        choosing_votes, counted_votes: (K,) int64 each, from independent draws of the noise.
        sigma: of the noise; the radius is in its units.
        alpha: in (0, 1), the share of certificates that may be wrong.

    Returns:
        The class and the radius, or `ABSTAIN` and 0.
    """
    label = int(choosing_votes.argmax())
    bound = binomial_lower_bound(int(counted_votes[label]), int(counted_votes.sum()), alpha)
    return (label, sigma * NormalDist().inv_cdf(bound)) if bound > 0.5 else (ABSTAIN, 0.0)


def largest_radius(num_votes: int, sigma: float, alpha: float) -> float:
    """What `certificate` says where all of `num_votes` agree; 0 where even these are too few."""
    votes = torch.tensor([num_votes])
    return certificate(votes, votes, sigma, alpha)[1]
