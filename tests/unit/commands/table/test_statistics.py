"""Statistics against scipy's own tests, enumeration, normal theory, and sums by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from bpt_dist.commands.table.statistics import bootstrap_interval, is_better, mean_and_deviation, paired_p_value


def test_mean_and_sample_deviation_by_hand():
    assert mean_and_deviation([2.0, 4.0, 9.0]) == pytest.approx((5.0, 13**0.5))  # (9 + 1 + 16) / (3 - 1) = 13
    assert mean_and_deviation([2.0]) == (2.0, None)


def test_few_seeds_use_the_paired_t_test_over_common_seeds():
    first, second = {0: 0.80, 1: 0.83, 2: 0.81, 9: 0.1}, {0: 0.78, 1: 0.80, 2: 0.80, 8: 0.9}
    expected = stats.ttest_rel([0.80, 0.83, 0.81], [0.78, 0.80, 0.80]).pvalue
    assert paired_p_value(first, second) == pytest.approx(expected)
    # By hand: differences .02 .03 .01, mean .02, sd .01, t = .02 / (.01 / sqrt 3) = 3.4641, two-sided p with 2 degrees.
    assert paired_p_value(first, second) == pytest.approx(0.0742, abs=1e-4)
    assert paired_p_value({0: 0.5}, {0: 0.1}) is None
    assert paired_p_value({0: 0.5}, {1: 0.1}) is None


def test_six_seeds_use_the_exact_permutation_test():
    differences = np.array([0.03, 0.01, -0.02, 0.04, 0.05, 0.02])
    signed = [abs(np.mean(np.array(s) * differences)) for s in itertools.product((-1, 1), repeat=6)]
    expected = np.mean([value >= abs(differences.mean()) - 1e-12 for value in signed])
    first = dict(enumerate(0.5 + differences))
    assert paired_p_value(first, dict.fromkeys(range(6), 0.5)) == pytest.approx(expected)


def test_equal_differences_have_a_known_answer():
    base = {0: 0.5, 1: 0.7}
    assert paired_p_value(base, base) == 1.0
    assert paired_p_value({0: 0.6, 1: 0.8}, base) == 0.0


def test_the_bootstrap_agrees_with_the_normal_theory_of_a_proportion():
    rng = np.random.default_rng(3)
    first = {str(i): float(x) for i, x in enumerate(rng.random(2000) < 0.8)}
    second = {str(i): float(x) for i, x in enumerate(rng.random(2000) < 0.7)}
    differences = np.array([first[k] - second[k] for k in first])
    half_width = 1.96 * differences.std(ddof=1) / 2000**0.5
    low, high = bootstrap_interval({0: first}, {0: second})
    assert low == pytest.approx(differences.mean() - half_width, abs=0.002)
    assert high == pytest.approx(differences.mean() + half_width, abs=0.002)
    assert bootstrap_interval({0: first}, {0: second}) == (low, high), "seeded: the same table every time"


def test_seeds_do_not_shrink_the_bootstrap_interval():
    rights = {str(i): float(i % 3 == 0) for i in range(90)}
    wrongs = dict.fromkeys(rights, 0.0)
    once = bootstrap_interval({0: rights}, {0: wrongs})
    assert bootstrap_interval(dict.fromkeys(range(9), rights), dict.fromkeys(range(9), wrongs)) == once


def test_the_bootstrap_pairs_examples_or_abstains():
    assert bootstrap_interval({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None
    assert bootstrap_interval({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None


def test_better_needs_both_tests_and_the_right_sign():
    high, low = {0: 0.80, 1: 0.81, 2: 0.82}, {0: 0.70, 1: 0.711, 2: 0.72}
    assert is_better(high, low)
    assert not is_better(low, high)
    few = {s: {"a": 1.0, "b": 1.0, "c": 0.0} for s in high}, {s: {"a": 1.0, "b": 0.0, "c": 0.0} for s in high}
    assert not is_better(high, low, *few), "one example of three decides nothing"
