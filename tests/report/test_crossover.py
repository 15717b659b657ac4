"""The crossover: cases worked out by hand, and simulated gaps whose crossover is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from rethink_prune.report.crossover import Crossover, Place, find_crossover

NAN = float("nan")


def test_the_gap_is_interpolated_in_the_logarithm_of_the_length() -> None:
    found = find_crossover([1, 10, 100], [[3.0, 1.0, -1.0]])
    assert found == Crossover(1, 100, pytest.approx(10**1.5), None, (pytest.approx(10**1.5),))


@pytest.mark.parametrize(("gaps", "place"), [
    ((3.0, 2.0, 1.0, 0.5), "beyond"),
    ((-0.1, -2.0, -1.0, -0.5), "below"),
    ((0.0, 0.0, 0.0, 0.0), "below"),  # no head start
    ((3.0, 1.0, 0.0, -1.0), 4.0),
    ((3.0, -1.0, 2.0, -3.0), 4 * 2 ** (2 / 5)),  # the second change of sign: 3 - 1 + 2 is more than 3
    ((3.0, -2.0, 1.0, -3.0), 2 ** (3 / 5)),  # the first one
    ((-1.0, 4.0, -1.0, -1.0), 2 * 2 ** (4 / 5)),
])  # fmt: skip
def test_the_change_of_sign_counts_that_agrees_with_most_of_the_gaps(gaps: tuple[float, ...], place: Place) -> None:
    assert find_crossover([1, 2, 4, 8], [gaps]).place == (place if isinstance(place, str) else pytest.approx(place))


def test_the_interval_holds_the_lengths_at_which_the_t_interval_holds_zero() -> None:
    gaps = np.array([[2.0, -2.0], [2.5, -1.5], [3.0, -2.5]])
    found = find_crossover([1, 16], gaps.tolist())
    assert found.interval is not None
    for end in found.interval:
        assert isinstance(end, float)
        share = math.log(end) / math.log(16)
        there = gaps[:, 0] + share * (gaps[:, 1] - gaps[:, 0])
        # The 0.975 quantile of t with two degrees of freedom.
        half = 4.302652729749464 * there.std(ddof=1) / math.sqrt(3)
        assert abs(there.mean()) == pytest.approx(half)


def test_seeds_without_spread_have_an_interval_of_no_width() -> None:
    found = find_crossover([1, 4], [[1.0, -1.0]] * 3)
    assert found.interval == (pytest.approx(2), pytest.approx(2))


def test_a_seed_counts_where_it_has_neighbouring_lengths() -> None:
    found = find_crossover([1, 4, 16], [[2.0, 1.0, -1.0], [3.0, 1.5, -0.5], [2.5, 1.2, NAN], [NAN, NAN, -0.6]])
    assert found.by_seed == (pytest.approx(8), pytest.approx(4 * 4**0.75), None, None)
    assert found.place == pytest.approx(4 ** (1 + (3.7 / 3) / (3.7 / 3 + 0.7)))


# A rate r over R simulations has a standard error of sqrt(r (1 - r) / R); four of them are allowed.
SIMULATIONS = 400
LENGTHS = np.array([1, 2, 4, 8, 16, 32])

Curve = Callable[[np.ndarray], np.ndarray]


def straight(x: np.ndarray) -> np.ndarray:
    return 3 - 1.5 * x  # crosses at 7.4


def flattening(x: np.ndarray) -> np.ndarray:
    return 8 * np.exp(-1.2 * x) - 0.5  # crosses at 10.1, or at 10.8 where it is interpolated; seven points at first


def falling(x: np.ndarray) -> np.ndarray:
    return 2 - np.exp(x - math.log(8))  # crosses at 16


def simulate(curve: Curve, seeds: int, noise: float, level: float) -> list[list[list[float]]]:
    """Return gaps of studies whose seeds differ in the whole gap (by `level`) and at each length (by `noise`)."""
    generator = np.random.default_rng(seeds)
    shifts = generator.normal(0, level, (SIMULATIONS, seeds, 1))
    return (curve(np.log(LENGTHS)) + shifts + generator.normal(0, noise, (SIMULATIONS, seeds, len(LENGTHS)))).tolist()


def find_all(curve: Curve, seeds: int) -> list[Crossover]:
    return [find_crossover(LENGTHS.tolist(), gaps) for gaps in simulate(curve, seeds, noise=0.3, level=0.3)]


def known_place(curve: Curve) -> float:
    place = find_crossover(LENGTHS.tolist(), [curve(np.log(LENGTHS)).tolist()]).place
    assert isinstance(place, float)
    return place


def covers(found: Crossover, place: float) -> bool:
    assert found.interval is not None
    low, high = found.interval
    after = low == "below" or (isinstance(low, float) and low <= place)
    return after and (high == "beyond" or (isinstance(high, float) and high >= place))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("curve", [straight, flattening, falling])
def test_intervals_cover_a_known_crossover_in_95_percent(curve: Curve, seeds: int) -> None:
    rate = np.mean([covers(each, known_place(curve)) for each in find_all(curve, seeds)])
    # Where the noise lets more than one stretch be possible, the interval spans them, and covers more often.
    assert rate >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
    if curve is not flattening and seeds > 2:
        assert rate <= 0.95 + 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)


@pytest.mark.parametrize(("curve", "outside"), [
    (lambda x: 8 * np.exp(-1.2 * x) + 0.2, "beyond"),
    (lambda x: -0.2 - 0.1 * x, "below"),
])  # fmt: skip
@pytest.mark.parametrize("seeds", [3, 8])
def test_a_crossover_outside_the_lengths_is_excluded_in_5_percent_at_most(
    curve: Curve, outside: str, seeds: int
) -> None:
    side = 1 if outside == "beyond" else 0
    missed = np.mean([each.interval[side] != outside for each in find_all(curve, seeds) if each.interval])
    assert missed <= 0.05 + 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)


def middle(places: Iterable[Place | None], true: float) -> float:
    """Return by what share of itself the median place is off."""
    ends = {"below": 0.0, "beyond": math.inf}
    return float(np.median([ends[p] if isinstance(p, str) else p for p in places if p is not None])) / true - 1


@pytest.mark.parametrize("curve", [straight, flattening, falling])
def test_noise_moves_the_crossover_neither_way(curve: Curve) -> None:
    """With as much noise as the gap changes from one length to the next."""
    true, simulated = known_place(curve), simulate(curve, 8, noise=1.0, level=0.0)
    found = [find_crossover(LENGTHS.tolist(), gaps) for gaps in simulated]
    assert abs(middle([each.place for each in found], true)) < 0.05
    assert abs(middle([seed for each in found for seed in each.by_seed], true)) < 0.15
    # Up to its first gap that is not positive, a seed changes its sign once.
    first = [
        seed[: next((i + 1 for i, gap in enumerate(seed) if gap <= 0), None)] for gaps in simulated for seed in gaps
    ]
    early = [find_crossover(LENGTHS[: len(seed)].tolist(), [seed]).place for seed in first]
    assert -0.4 < middle(early, true) < -0.08
