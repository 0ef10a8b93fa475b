"""The linear probe: logistic regression on standardised features."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from latent_egc.config import ConfigError, within


@dataclass(frozen=True)
class LinearSettings:
    """The linear probe: logistic regression by L-BFGS on standardised features."""

    c: tuple[float, ...] = within((1e-3, 1e-2, 1e-1), 1e-12)  # inverse strengths of the L2 penalty to choose from
    held_out: float = within(0.2, 0.01, 0.9)  # share of the training rows that chooses c, and the best cell
    max_iter: int = within(100, 1)


@dataclass(frozen=True)
class ProbeScore:
    """What a linear probe reached.

    Args:
        held_out: accuracy on the held-out training rows, with which everything is chosen.
        accuracy: on the validation rows, after refitting on all training rows.
        c: the chosen inverse strength of the penalty.
    """

    held_out: float
    accuracy: float
    c: float


def standardised(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Every array (N, ...) less the mean of `train` and divided by its deviation; constant features become 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6)
    return [(array - mean) * scale for array in (train, *others)]


def fit_logistic(features: np.ndarray, labels: np.ndarray, c: float, max_iter: int) -> LogisticRegression:
    """Multinomial logistic regression by L-BFGS: sum of the rows' losses + |W|^2 / 2c.

    Args:
        features: (N, ...), standardised.
        labels: (N,) of at least two classes.
        c: inverse strength of the penalty.
        max_iter: a fit that has not converged by then is used as it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=max_iter).fit(features.reshape(len(features), -1), labels)


def held_out_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose with, drawn by the seed.

    Raises:
        ConfigError: too few rows, or of fewer than two classes.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    count = round(share * len(labels))
    choosing, fitting = order[:count], order[count:]
    if count == 0 or len(np.unique(labels[fitting])) < 2:
        raise ConfigError(
            f"linear.held_out={share:g} of {len(labels)} training rows leaves {len(fitting)} of "
            f"{len(np.unique(labels[fitting]))} classes to fit on and {count} to choose with"
        )
    return fitting, choosing


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    config: LinearSettings,
    seed: int,
) -> tuple[ProbeScore, np.ndarray]:
    """Chooses c on held-out training rows, refits on all of them, and judges the validation rows.

    Args:
        train, test: (N, ...) and (M, ...), any features.
        train_labels, test_labels: (N,) and (M,).
        config: of the probe.
        seed: of the held-out rows.

    Returns:
        The score, and the predicted labels (M,) of `test`.
    """
    fitting, choosing = held_out_split(train_labels, config.held_out, seed)
    train, test = (rows.reshape(len(rows), -1) for rows in standardised(train, test))
    held_out = {}
    for c in config.c:
        model = fit_logistic(train[fitting], train_labels[fitting], c, config.max_iter)
        held_out[c] = float(model.score(train[choosing], train_labels[choosing]))
    c = max(held_out, key=lambda c: (held_out[c], -c))  # of equals the strongest penalty
    predicted = fit_logistic(train, train_labels, c, config.max_iter).predict(test)
    return ProbeScore(held_out[c], float((predicted == test_labels).mean()), c), predicted
