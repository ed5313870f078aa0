"""Means, paired differences and their intervals; pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from scipy.stats import bartlett

LEVEL = 0.95
SMALLEST = 1e-9
"""Half widths up to this are none: equal values, as shares of few pictures may be, tell nothing of
how far they would spread."""


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one may lie.

    Attributes:
        mean: of the sample.
        low: end of the interval; minus infinity for a single value.
        high: the other end.
        n: values.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half of the width."""
        return (self.high - self.low) / 2

    @property
    def leaves_out_zero(self) -> bool:
        """Whether it lies on one side of 0."""
        return self.half > SMALLEST and (self.low > 0 or self.high < 0)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and the sample standard deviation (n - 1); NaN for a single value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), deviation


def half_width(n: int) -> float:
    """Compute half of a t interval's width, in standard deviations: t(0.975, n - 1) / sqrt n.

    Three values have 2.48, five 1.24, ten 0.72.
    """
    return float(stdtrit(n - 1, (1 + LEVEL) / 2)) / math.sqrt(n) if n > 1 else math.inf


def interval(values: Sequence[float]) -> Interval:
    """Compute the t interval of the mean of normal values, at least one."""
    mean, deviation = mean_and_deviation(values)
    half = half_width(len(values)) * deviation if len(values) > 1 else math.inf
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """Compute the interval of the mean of a - b over the seeds that both have.

    Args:
        a: value by seed.
        b: the same of what it is compared with.

    Returns:
        None without a common seed.
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    return interval(differences) if differences else None


def pooled_difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Sequence[float]]
) -> Interval | None:
    """Compute the interval of mean a - mean b with the standard deviation of many groups.

    s^2 = sum over groups of (n - 1) s_g^2 / f, f = sum of (n - 1); half width
    t(0.975, f) s sqrt(1/n_a + 1/n_b). Few values know their own deviation badly, many groups
    together know it well, if it is the same in all.

    Returns:
        None where Bartlett's test tells the groups' deviations apart (p < 0.05).
    """
    variances = [float(np.var(values, ddof=1)) for values in groups]
    if len(groups) < 2 or min(variances) == 0 or bartlett(*groups).pvalue < 1 - LEVEL:
        return None
    freedom = [len(values) - 1 for values in groups]
    pooled = float(np.average(variances, weights=freedom))
    half = float(stdtrit(sum(freedom), (1 + LEVEL) / 2))
    half *= math.sqrt(pooled * (1 / len(a) + 1 / len(b)))
    mean = float(np.mean(a) - np.mean(b))
    return Interval(mean, mean - half, mean + half, min(len(a), len(b)))


def seeds_share(values: Sequence[Sequence[float]]) -> float:
    """Estimate how much of an arm's variance the seeds explain: what pairing can remove.

    Two-way analysis of variance without replication: with the mean squares MS of A arms' seeds,
    s^2 = (MS_seeds - MS_rest) / A, at least 0, and the share is s^2 / (s^2 + MS_rest).

    Args:
        values: a row for each of at least two arms, with the same two or more seeds.

    Returns:
        A share in [0, 1]; 0 where nothing varies.
    """
    table = np.asarray(values, dtype=float)
    arms, seeds = table.shape
    by_seed = table.mean(0)
    rest = table - table.mean(1, keepdims=True) - by_seed + table.mean()
    unexplained = float((rest**2).sum()) / ((arms - 1) * (seeds - 1))
    explained = max(0.0, float(by_seed.var(ddof=1)) - unexplained / arms)
    return explained / (explained + unexplained) if explained else 0.0


def verdict(difference: Interval | None, higher_is_better: bool) -> str:
    """Decide whether something is better by its difference to what it is compared with.

    Returns:
        "confirmed" or "refuted" where the interval lies on one side of 0, else "undecided";
        "not run" without a difference.
    """
    if difference is None:
        return "not run"
    if difference.leaves_out_zero:
        return "confirmed" if (difference.low > 0) == higher_is_better else "refuted"
    return "undecided"
