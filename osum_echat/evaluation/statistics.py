"""How sure a number is: bootstrap intervals over items, paired differences of two systems, agreement of two judges.

A measure is a ratio of sums over items (errors over words; right answers over items), so one resampling serves all:
draw items with replacement, add up, divide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over ``count`` items; the interval is None below two items."""

    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """B minus A on the same items. ``p``: share of resamples on the other side of zero, doubled (two-sided)."""

    value: float
    low: float
    high: float
    p: float
    count: int

    @property
    def is_clear(self) -> bool:
        """The interval does not hold zero."""
        return self.low > 0 or self.high < 0


def draws(count: int, resamples: int = RESAMPLES, seed: int = 0) -> npt.NDArray[np.int64]:
    """Indices [resamples, count] drawn with replacement; the same for the same arguments."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Sums over the last axis, divided; NaN where nothing was counted."""
    below = denominators.sum(axis=-1)
    return np.where(below > 0, numerators.sum(axis=-1) / np.where(below > 0, below, 1.0), np.nan)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Sum of numerators over sum of denominators, with its percentile bootstrap interval.

    Raises:
        ValueError: lists of different length, or nothing to divide by.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(f"{len(above)} numerators but {len(below)} denominators")
    if not below.sum() > 0:
        raise ValueError("a ratio needs something to divide by")
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return Estimate(value, None, None, len(above))
    index = draws(len(above), resamples, seed)
    low, high = _percentiles(_ratio(above[index], below[index]), level)
    return Estimate(value, low, high, len(above))


def statistic_interval(
    count: int, statistic: Callable[[npt.NDArray[np.int64]], float], resamples: int = 500, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Any statistic of the items with these indices (macro-F1, a percentile), with its percentile bootstrap
    interval."""
    value = statistic(np.arange(count))
    if count < 2:
        return Estimate(value, None, None, count)
    values = np.array([statistic(row) for row in draws(count, resamples, seed)])
    low, high = _percentiles(values, level)
    return Estimate(value, low, high, count)


def _percentiles(values: Floats, level: float) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def paired_difference(
    a: Sequence[tuple[float, float]],
    b: Sequence[tuple[float, float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Ratio of ``b`` minus ratio of ``a``; the same items are drawn for both, so what is hard for both cancels.

    Raises:
        ValueError: not the same number of items, or fewer than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired comparison needs the same items (two or more) on both sides, found {len(a)} and {len(b)}")
    one, two = np.asarray(a, float), np.asarray(b, float)
    value = float(_ratio(two[:, 0], two[:, 1]) - _ratio(one[:, 0], one[:, 1]))
    index = draws(len(a), resamples, seed)
    values = _ratio(two[index, 0], two[index, 1]) - _ratio(one[index, 0], one[index, 1])
    low, high = _percentiles(values, level)
    return Difference(value, low, high, _two_sided(values), len(a))


def paired_statistic(
    count: int,
    a: Callable[[npt.NDArray[np.int64]], float],
    b: Callable[[npt.NDArray[np.int64]], float],
    resamples: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Any statistic (macro-F1) of ``b`` minus that of ``a``, each given the indices of the same drawn items. Raises
    ValueError for fewer than two items."""
    if count < 2:
        raise ValueError(f"a paired comparison needs two items or more, found {count}")
    every = np.arange(count)
    values = np.array([b(row) - a(row) for row in draws(count, resamples, seed)])
    low, high = _percentiles(values, level)
    return Difference(b(every) - a(every), low, high, _two_sided(values), count)


def _two_sided(values: Floats) -> float:
    return min(1.0, 2 * min(float(np.mean(values <= 0)), float(np.mean(values >= 0))))


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean F1 over the labels that occur among true or predicted ones (as scikit-learn's ``average="macro"``); 0.0 for
    no pairs."""
    labels = sorted({label for pair in pairs for label in pair})
    if not labels:
        return 0.0
    scores = []
    for label in labels:
        both = sum(true == predicted == label for true, predicted in pairs)
        either = sum(true == label for true, _ in pairs) + sum(predicted == label for _, predicted in pairs)
        scores.append(2 * both / either)
    return float(np.mean(scores))


def macro_recall(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean share of right ones over the true labels (balanced accuracy); 0.0 for no pairs."""
    every, right = Counter(true for true, _ in pairs), Counter(true for true, predicted in pairs if true == predicted)
    return float(np.mean([right[label] / count for label, count in every.items()])) if every else 0.0


def weighted_kappa(a: Sequence[int], b: Sequence[int], low: int = 1, high: int = 5) -> float:
    """Cohen's kappa with quadratic weights of two judges' scores; NaN when both always say the same one value."""
    size = high - low + 1
    observed = np.zeros((size, size))
    for one, two in zip(a, b, strict=True):
        observed[one - low, two - low] += 1
    weights = np.subtract.outer(np.arange(size), np.arange(size)) ** 2 / (size - 1) ** 2
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / max(observed.sum(), 1)
    chance = float((weights * expected).sum())
    return 1.0 - float((weights * observed).sum()) / chance if chance else float("nan")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation with mean ranks for ties; NaN when a side is constant."""
    one, two = _ranks(np.asarray(a, float)), _ranks(np.asarray(b, float))
    if one.std() == 0 or two.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2.0)[inverse]
