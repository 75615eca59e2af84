"""Is one row of the table better than another? Paired tests over seeds and over test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
ROUNDING = 1e-9  # percent: differences smaller than this are rounding of float64
PERMUTATION_FROM = 6  # the smallest number of seeds at which an exact sign-flip test can reach p < 0.05 (2/64)
RULE = (
    "Bold: the best mean of a column, set only if it beats every other row of its block twice at the 5 % level: in a "
    "paired test over the common seeds (two-sided t-test; exact sign-flip permutation test from 6 seeds) and, where "
    "the metric is the share of right answers and both rows have stored predictions, in a paired bootstrap over test "
    "examples (2,000 resamples, 95 % percentile interval without zero). One seed has no spread, hence no bold. "
    "Columns are not corrected for one another."
)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (n - 1 in the denominator); the latter is None when n = 1."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None


def paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float | None:
    """Return the two-sided p-value of "no difference" over the seeds both have, None with fewer than two.

    Seeds pair the runs: the same seed means the same order of every task's rows and the same few-shot rows. Within one method it
    also means the same start; methods draw theirs apart. The test holds however much the pairs have in common.
    """
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) <= 1:
        return None
    differences = np.array([first[s] - second[s] for s in seeds], dtype=np.float64)
    if len(seeds) >= PERMUTATION_FROM:
        outcome = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=99_999,
            rng=np.random.default_rng(0),
        )
        return float(outcome.pvalue)
    # The t-test divides by the spread of the differences: without spread the answer is known, the quotient not.
    if np.ptp(differences) <= ROUNDING:
        return 1.0 if abs(float(differences[0])) <= ROUNDING else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


class Difference(NamedTuple):
    """A mean difference between two rows over seeds, in the unit of the scores.

    `interval` is the 95 % interval and `p_value` the two-sided p-value of the paired t-test; both are None where there is no spread
    to test against: with one seed, or with the same difference at every seed.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of one difference a seed with what the paired t-test says of it. Needs at least one."""
    values = np.asarray(differences, dtype=np.float64)
    # Scores are shares of some hundred rows, so that few seeds can agree by chance: without spread nothing is tested.
    if values.size == 1 or np.ptp(values) <= ROUNDING:
        return Difference(float(values.mean()), None, None)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(1 - LEVEL)
    return Difference(float(values.mean()), (float(low), float(high)), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979), in the order given: the chance of any error stays below 0.05."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % t interval of the mean of one value a seed; None with one seed."""
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean - half, mean + half


def bootstrap_interval(
    first: Mapping[int, Mapping[str, float]],
    second: Mapping[int, Mapping[str, float]],
    num_resamples: int = 2000,
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the mean per-example difference, None when no example is paired.

    Arguments are seed -> row id -> 1.0 for a right answer, else 0.0. The difference of an example is first
    averaged over the common seeds, so that seeds are not counted as further independent examples.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    rows = set.intersection(*(set(side[s]) for side in (first, second) for s in seeds))
    if not rows:
        return None
    ordered = sorted(rows)
    differences = np.mean([[first[s][r] - second[s][r] for r in ordered] for s in seeds], axis=0)
    generator = np.random.default_rng(0)
    # One resample at a time: 2,000 x 40,000 indices (QQP) at once would take 640 MB.
    means = [differences[generator.integers(len(ordered), size=len(ordered))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def is_better(
    first: Mapping[int, float],
    second: Mapping[int, float],
    first_right: Mapping[int, Mapping[str, float]] | None = None,
    second_right: Mapping[int, Mapping[str, float]] | None = None,
) -> bool:
    """Return whether `first` beats `second` by `RULE`: seed -> value and, if stored, seed -> row id -> right."""
    p_value = paired_p_value(first, second)
    if p_value is None or p_value >= LEVEL:
        return False
    common = first.keys() & second.keys()
    if float(np.mean([first[s] - second[s] for s in common])) <= 0:
        return False
    interval = bootstrap_interval(first_right, second_right) if first_right and second_right else None
    return interval is None or interval[0] > 0
