"""What a suite finds: numbers with confidence intervals, tables, pictures and remarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.stats

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True)
class Metric:
    """One number."""

    value: float  # as computed on all samples; a share is in [0, 1]
    interval: tuple[float, float] | None = None  # bootstrap percentiles of the confidence level around it
    percent: bool = False  # whether it is shown as a percentage

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} %" if self.percent else f"{self.value:.5g}"

    @property
    def interval_text(self) -> str:
        """The interval as shown, "" without one."""
        if self.interval is None:
            return ""
        low, high = (100 * bound if self.percent else bound for bound in self.interval)
        return f"{low:.2f} to {high:.2f} %" if self.percent else f"{low:.4g} to {high:.4g}"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; cells are text or numbers, None is an empty cell."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Curves:
    """Curves of one quantity as numbers, by which `latent-egc compare` draws those of several reports together."""

    x_name: str
    y_name: str
    series: dict[str, tuple[Sequence[float], Sequence[float | Metric]]]  # name -> x and y of its points
    aims_at_diagonal: bool = False  # y = x is what is wished for


@dataclass(frozen=True)
class Figure:
    """A picture: PNG bytes and what is to be seen."""

    name: str  # of its file
    caption: str
    png: bytes
    shows_data: bool = False  # images of the dataset, which its terms may not allow to publish
    curves: tuple[Curves, ...] = ()  # what it shows


@dataclass
class SuiteResult:
    """What one suite found."""

    num_samples: int  # images (or generated samples) that were judged
    metrics: dict[str, Metric]  # name -> number, the main ones first
    tables: list[Table] = field(default_factory=list)  # these and the figures in the order in which they are shown
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know to compare the numbers with others


def bootstrapped(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    num_resamples: int,
    seed: int,
    percent: bool = False,
    strata: np.ndarray | None = None,
) -> Metric:
    """A statistic of all samples with its 95 % bootstrap percentile interval; rows are resampled together.

    Args:
        statistic: takes as many arrays as `samples`, returns a number.
        *samples: (N, ...) each, row i of all of them belonging together.
        num_resamples, seed: of the bootstrap.
        percent: as in `Metric`.
        strata: (N,), rows are resampled within each value, so that every resample has as many of each; None: one.
    """
    value = float(statistic(*samples))
    strata = np.zeros(len(samples[0])) if strata is None else strata
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    if min(map(len, groups)) < 2:
        return Metric(value, None, percent)
    # Rows are resampled by number, so that samples of any shape stay whole.
    interval = scipy.stats.bootstrap(
        groups,
        lambda *rows: statistic(*(sample[np.concatenate(rows)] for sample in samples)),
        vectorized=False,
        paired=False,
        n_resamples=num_resamples,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Metric(value, (float(interval.low), float(interval.high)), percent)
