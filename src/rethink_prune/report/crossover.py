"""Where a gap that was measured at several lengths reaches zero, and how sure that is: the crossover.

The gap is interpolated linearly in the logarithm of the length. Two choices matter, and simulations of both are in
``tests/report/test_crossover.py``:

- Noise makes a gap change its sign several times. The first change comes too early (by 10 to 40 % where the noise is as
  large as what the gap changes from one length to the next), the last one too late. So the change counts that agrees
  with most of the gaps: the sum of those before it, less the sum of those after it, is greatest. It treats both sides
  alike, and it is where the best fit of a falling curve (isotonic regression) changes its sign.
- The interval holds every length at which the paired-t interval of the interpolated gap holds zero. It does so at its
  nominal level with two seeds as well, and with seeds whose own gap never changes its sign. An interval of the seeds'
  crossovers by their ranks would reach 75 % with three seeds, and go from the least to the greatest with eight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rethink_prune.report.statistics import LEVEL

# A length, or that it is shorter or longer than all that were measured.
Place = float | Literal["below", "beyond"]


@dataclass(frozen=True)
class Crossover:
    """Where the gap of several seeds reaches zero.

    Attributes
    ----------
    shortest, longest
        The lengths between which the gap was measured.
    place
        Of the mean gap over seeds.
    interval
        At 95 %; None with one seed.
    by_seed
        Of each seed's own gap; None where that is outside the lengths that the seed has, and it lacks some.
    """

    shortest: float
    longest: float
    place: Place
    interval: tuple[Place, Place] | None
    by_seed: tuple[Place | None, ...]


def find_crossover(lengths: Sequence[float], gaps: Sequence[Sequence[float]]) -> Crossover:
    """Return where a gap reaches zero from above.

    Parameters
    ----------
    lengths
        At which it was measured, growing; two or more, above zero.
    gaps
        For each seed one at each length; NaN where it is not known. A seed counts wherever it has two neighbouring
        lengths, and at each length there is one or more.

    Examples
    --------
    >>> found = find_crossover([1, 4, 16], [[2.0, 1.0, -1.0], [3.0, 1.0, -3.0], [4.0, 1.0, -2.0]])
    >>> round(found.place, 2), [round(seed, 2) for seed in found.by_seed]
    (6.35, [8.0, 5.66, 6.35])
    >>> find_crossover([1, 4], [[2.0, 1.0], [3.0, 2.0]]).place
    'beyond'
    """
    positions, values = np.log(np.asarray(lengths, dtype=float)), np.asarray(gaps, dtype=float)
    position = _crossing(positions, np.nanmean(values, axis=0))

    def place(found: float) -> Place:
        if np.isinf(found):
            return "below" if found < 0 else "beyond"
        return float(np.exp(found))

    interval = None
    if len(values) > 1:
        accepted = [position, *_undecided(positions, values)]
        interval = (place(min(accepted)), place(max(accepted)))

    def place_of_seed(seed: NDArray[np.float64]) -> Place | None:
        known = ~np.isnan(seed)
        found = _crossing(positions[known], seed[known])
        return place(found) if known.all() or np.isfinite(found) else None

    by_seed = tuple(map(place_of_seed, values))
    return Crossover(float(lengths[0]), float(lengths[-1]), place(position), interval, by_seed)


def _crossing(positions: NDArray[np.float64], gaps: NDArray[np.float64]) -> float:
    """Return where a gap reaches zero from above; infinite if that is outside the positions."""
    # Where the sum so far is greatest, the sum of what comes before less that of what comes after is too.
    after = int(np.argmax([0.0, *np.cumsum(gaps)]))
    if after == 0:
        return -np.inf
    if after == len(gaps):
        return np.inf
    # The first greatest sum: the gap before it is above zero, the one after it is not.
    share = gaps[after - 1] / (gaps[after - 1] - gaps[after])
    return float(positions[after - 1] + share * (positions[after] - positions[after - 1]))


def _undecided(positions: NDArray[np.float64], gaps: NDArray[np.float64]) -> Iterator[float]:
    """Yield the ends of the stretches in which the seeds do not exclude that the mean gap is zero.

    Infinite ones stand for an outermost position: what is not excluded there is not excluded outside either.
    """
    for number in range(len(positions) - 1):
        both = gaps[:, number : number + 2]
        both = both[~np.isnan(both).any(axis=1)]
        excess = _excess(both)
        # Roots of a polynomial come with rounding errors, and a double one with imaginary parts.
        roots = [root.real for root in excess.roots if abs(root.imag) < 1e-9]
        for share in [*(root for root in roots if 0 < root < 1), *(end for end in (0, 1) if excess(end) <= 0)]:
            if number == 0 and share == 0:
                yield -np.inf
            elif number == len(positions) - 2 and share == 1:
                yield np.inf
            else:
                yield float(positions[number] + share * (positions[number + 1] - positions[number]))


def _excess(both: NDArray[np.float64]) -> np.poly1d:
    """Return by how much the squared mean gap exceeds that of the t interval's end, by the share of the way.

    Between two lengths a seed's gap is ``first + share * step``, so means are linear and variances quadratic in the
    share.
    """
    n = len(both)
    if n < 2:
        return np.poly1d([-1.0])  # one seed excludes nothing
    first, step = both[:, 0], both[:, 1] - both[:, 0]
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) ** 2 / n * np.cov(first, step)
    mean, slope = first.mean(), step.mean()
    return np.poly1d([slope**2 - half[1, 1], 2 * (mean * slope - half[0, 1]), mean**2 - half[0, 0]])
