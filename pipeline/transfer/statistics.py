"""How sure a number is: intervals of accuracies, paired tests of two classifiers, several claims at once.

Two things vary. Test images: then a claim is about these classifiers, and not about how they were made.
Seeds of training: then it is about the methods, and every seed counts once, however many images there are.

SciPy is imported by those that need it: all that train or score import this file, and it takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_COUNTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Both ends, inclusive, in the unit of what it is of."""

    low: float
    high: float


def wilson(right: int, samples: int) -> Interval:
    """The 95 % interval of a share of independent samples (Wilson, 1927,
    https://doi.org/10.1080/01621459.1927.10502953): it never leaves 0 to 1.
    """
    from scipy import stats

    found = stats.binomtest(right, samples).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(low=float(found.low), high=float(found.high))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two classifiers on the same images.

    Attributes:
        samples: images that both have seen.
        first_only, second_only: images that only one of them has right.
        difference: accuracy of the second less that of the first.
        interval: of that, 95 %.
        p: of McNemar's exact test, that they are equally good.
    """

    samples: int
    first_only: int
    second_only: int
    difference: float
    interval: Interval
    p: float

    @property
    def decided(self) -> bool:
        """Whether the interval says that one of them is better."""
        return self.interval.low > 0 or self.interval.high < 0


def compare_paired(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compare what two classifiers got right, (n,) each, image by image.

    McNemar, 1947 (https://doi.org/10.1007/BF02295996), exact: of the images that one alone has right, each
    is a toss of a fair coin. The interval is Wald's with one image added to each side and two to all (Bonett
    and Price, 2012, https://doi.org/10.3102/1076998611411915).
    """
    from scipy import stats

    samples = len(first)
    first_only, second_only = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = first_only + second_only
    p = float(stats.binomtest(first_only, discordant).pvalue) if discordant else 1.0
    one, other = (first_only + 1) / (samples + 2), (second_only + 1) / (samples + 2)
    centre = other - one
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * sqrt((one + other - centre**2) / (samples + 2))
    return Paired(
        samples=samples,
        first_only=first_only,
        second_only=second_only,
        difference=(second_only - first_only) / samples,
        interval=Interval(low=max(-1.0, float(centre - half)), high=min(1.0, float(centre + half))),
        p=p,
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several claims, so that one that is below 0.05 is wrong in a twentieth of all tables at
    most (Holm, 1979, https://www.jstor.org/stable/4615733).
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(each) for each in adjusted]


def mean_of_seeds(values: Sequence[float]) -> tuple[float, Interval]:
    """The mean over trainings, and its 95 % interval by Student's t.

    Raises:
        ValueError: one training says nothing about others.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError("an interval over seeds needs two trainings at least")
    mean = float(np.mean(values))
    error = float(stats.sem(values))
    if error == 0:
        return mean, Interval(low=mean, high=mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return mean, Interval(low=float(low), high=float(high))


def compare_seeds(first: Sequence[float], second: Sequence[float]) -> float | None:
    """p of Welch's t-test that two methods are equally good, each by the accuracies of several trainings;
    None where these do not vary, or a method has one alone.
    """
    from scipy import stats

    if min(len(first), len(second)) < 2 or np.ptp(first) + np.ptp(second) == 0:
        return None
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    samples: int,
    *,
    draws: int = 1_000,
    seed: int = 0,
) -> Interval:
    """The 95 % interval of any statistic of independent samples: the percentiles of what it is of as many
    that are drawn with replacement (Efron and Tibshirani, 1993, chapter 13).

    Args:
        statistic: of (d, samples), how often each of d draws has each sample, its value for each, (d,).
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    at_once = max(1, _COUNTS_AT_ONCE // samples)
    values = []
    for start in range(0, draws, at_once):
        drawn = [generator.integers(samples, size=samples) for _ in range(min(at_once, draws - start))]
        values.append(statistic(np.stack([np.bincount(each, minlength=samples) for each in drawn])))
    low, high = np.quantile(np.concatenate(values), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))


def bootstrap_over_groups(
    right: NDArray[np.bool_], groups: NDArray[np.int64], *, draws: int = 1_000, seed: int = 0
) -> Interval:
    """The 95 % interval of an accuracy over images that come in groups, such as tiles of one photograph:
    groups are drawn with replacement, not images (Efron and Tibshirani, 1993, chapter 8).

    Args:
        right: (n,). groups: (n,) which each image belongs to.
    """
    _, number = np.unique(groups, return_inverse=True)
    hits, sizes = np.bincount(number, weights=right), np.bincount(number)
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn = generator.integers(len(sizes), size=(draws, len(sizes)))
    shares = hits[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))
