"""Statistics: cases worked out by hand, and rates over many simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rethink_prune.report.statistics import Difference, describe_seeds, holm, paired_difference, sign_flip_p


def differ(*differences: float, margin: float = 0.5) -> Difference:
    return paired_difference([90 + d for d in differences], [90.0] * len(differences), margin=margin)


def test_mean_and_standard_deviation_by_hand() -> None:
    found = describe_seeds([1.0, 2.0, 3.0, 6.0])
    assert (found.n, found.mean) == (4, 3.0)
    assert found.sd == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3))
    assert describe_seeds([5.0]).sd is None


def test_paired_t_interval_by_hand() -> None:
    found = differ(1.0, 2.0, 3.0)
    # Mean 2, sd 1, n 3: 4.30265 is the 0.975 quantile of t with two degrees of freedom.
    half = 4.302652729749464 / math.sqrt(3)
    assert found.mean == pytest.approx(2)
    assert found.sd == pytest.approx(1)
    assert found.interval == pytest.approx((2 - half, 2 + half))


def test_arms_are_compared_within_seeds() -> None:
    apart = paired_difference([90.0, 80.0, 70.0], [89.0, 78.5, 68.9], margin=0.5)
    assert apart.interval is not None
    assert apart.interval[0] > 0  # though the seeds themselves are ten points from each other


@pytest.mark.parametrize(("differences", "p"), [
    ((1.0, 2.0, 3.0), 2 / 8),  # all of one sign: the two extremes of eight
    ((-1.0, 2.0, 3.0), 4 / 8),  # sums of 4 or more: 6, 4; and their mirrors
    ((1.0, 2.0, -3.0), 1.0),
    ((0.1, 0.2, -0.3), 1.0),  # the sum is 0 only if it is exact
    ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 2 / 64),
    ((0.0, 0.0, 0.0), 1.0),
    ((0.4,), 1.0),
])  # fmt: skip
def test_sign_flip_p_by_hand(differences: tuple[float, ...], p: float) -> None:
    found = differ(*differences)
    assert found.p == pytest.approx(p)
    assert found.p >= found.p_floor == 2 / 2 ** len(differences)


def test_many_seeds_are_tested_by_random_flips_with_the_same_answer_each_time() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 40)
    found = differ(*differences)
    assert found == differ(*differences)
    assert found.p_floor == pytest.approx(2e-5)
    assert found.p == pytest.approx(0.02, abs=0.1)
    assert differ(*np.full(40, 1.0)).p == pytest.approx(2e-5)


def test_equivalence_by_hand() -> None:
    found = differ(0.0, 0.1, 0.2, 0.1, margin=0.5)
    # Mean 0.1, sd 0.0816, standard error 0.0408: t = (0.1 - 0.5) / 0.0408 = -9.798, three degrees of freedom.
    assert found.p_equivalent == pytest.approx(0.001130, abs=1e-5)
    assert differ(0.0, 0.1, 0.2, 0.1, margin=0.1).p_equivalent == pytest.approx(0.5)  # the mean is on the margin
    lost = differ(2.0, 2.1, 2.2).p_equivalent
    assert lost is not None
    assert lost > 0.99


@pytest.mark.parametrize("differences", [(0.5,), (0.3, 0.3, 0.3), (0.0, 0.0), (93.04 - 92.74, 0.3)])
def test_without_spread_there_is_no_interval(differences: tuple[float, ...]) -> None:
    found = differ(*differences)
    assert found.interval is None
    assert found.p_equivalent is None
    assert found.mean == pytest.approx(differences[0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


# Simulated studies. A rate r over R studies has a standard error of sqrt(r (1 - r) / R); four of them are allowed.
STUDIES = 600


def close(rate: float, nominal: float) -> bool:
    return abs(rate - nominal) <= 4 * math.sqrt(nominal * (1 - nominal) / STUDIES)


@pytest.mark.parametrize("n", [3, 8])
def test_intervals_cover_the_true_difference_in_95_percent(n: int) -> None:
    generator = np.random.default_rng(n)
    covered = 0
    for _ in range(STUDIES):
        seeds = generator.normal(90, 3, n)
        found = paired_difference(seeds + generator.normal(0.4, 0.3, n), seeds + generator.normal(0, 0.3, n), margin=1)
        assert found.interval is not None
        covered += found.interval[0] <= 0.4 <= found.interval[1]
    assert close(covered / STUDIES, 0.95)


# With n differences p takes the values 2 k / 2**n, so the rate is that of the largest that is at most 0.05.
@pytest.mark.parametrize(("n", "nominal"), [(5, 0.0), (6, 2 / 64), (8, 12 / 256)])
def test_false_positives_of_the_sign_flip_test(n: int, nominal: float) -> None:
    generator = np.random.default_rng(n)
    wrong = sum(sign_flip_p(generator.laplace(0, 0.5, n)) <= 0.05 for _ in range(STUDIES))
    assert close(wrong / STUDIES, nominal)


def test_arms_that_differ_by_the_margin_are_called_equivalent_in_5_percent() -> None:
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(STUDIES):
        found = differ(*generator.normal(0.5, 0.2, 8), margin=0.5).p_equivalent
        wrong += found is not None and found <= 0.05
    assert close(wrong / STUDIES, 0.05)


def test_holm_keeps_the_rate_of_tables_with_any_false_positive() -> None:
    generator = np.random.default_rng(0)
    plain = corrected = 0
    for _ in range(STUDIES):
        ps = [sign_flip_p(generator.normal(0, 0.5, 8)) for _ in range(4)]
        plain += min(ps) <= 0.05
        corrected += min(holm(ps)) <= 0.05
    assert plain / STUDIES > 0.12
    assert corrected / STUDIES <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / STUDIES)


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_scipy_gives_the_same(n: int) -> None:
    differences = np.round(np.random.default_rng(n).normal(0.2, 0.4, n), 2).tolist()
    found = differ(*differences)
    differences = np.round(np.add(90, differences) - 90, 9)
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    above = stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.5, alternative="less").pvalue
    counts = np.rint(differences * 1e9)
    exact = stats.permutation_test(
        (counts,), np.sum, permutation_type="samples", vectorized=True, n_resamples=2**16
    ).pvalue
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.p_equivalent == pytest.approx(max(above, below), rel=1e-12)
    assert found.p == exact
