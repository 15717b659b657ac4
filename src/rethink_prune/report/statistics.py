"""What seeds can say: means, paired differences, how uncertain they are, and what their number allows.

Arms of a study share the seed: its images, their order and their augmentation. So arms are compared seed by seed, and
everything here but :func:`describe_seeds` looks at differences within seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

LEVEL = 0.05
EXACT_UP_TO = 16
RESAMPLES = 99_999

# Accuracies are shares of whole images: what comes after so many digits of a difference is rounding.
_DIGITS = 9


@dataclass(frozen=True)
class SeedStatistics:
    """`n` values, one a seed: their mean and standard deviation (ddof 1), None for one value."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference(SeedStatistics):
    """The difference of two arms over `n` seeds, in points.

    Attributes
    ----------
    interval
        Paired-t interval of the mean at 95 %; None with one seed, or where all differences are equal.
    p
        Two-sided sign-flip permutation test: exact up to n = 16, from 99,999 random flips above.
    p_floor
        The smallest p that n allows, 2 / 2**n where the test is exact: no differences, however large, give less.
    p_equivalent
        TOST: the larger p of two one-sided paired t tests against the margin. None where there is no interval.
    """

    interval: tuple[float, float] | None
    p: float
    p_floor: float
    p_equivalent: float | None


def describe_seeds(values: Sequence[float]) -> SeedStatistics | None:
    """Return the mean and the standard deviation of one value a seed; None without values.

    Examples
    --------
    >>> describe_seeds([93.0, 94.0, 95.0])
    SeedStatistics(n=3, mean=94.0, sd=1.0)
    """
    if not values:
        return None
    return SeedStatistics(len(values), float(np.mean(values)), _standard_deviation(values))


def _standard_deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(first: Sequence[float], second: Sequence[float], *, margin: float) -> Difference:
    """Compare two arms over the seeds that both have.

    Parameters
    ----------
    first, second
        Accuracies in percent, of the same seeds in the same order; at least one.
    margin
        Points within which two arms count as equivalent.

    Returns
    -------
    Difference
        Of `first` minus `second`.

    Examples
    --------
    >>> difference = paired_difference([93.0, 94.0, 95.0], [92.0, 92.0, 92.0], margin=0.5)
    >>> difference.mean, difference.p, difference.p_floor
    (2.0, 0.25, 0.25)
    """
    differences = np.round(np.subtract(first, second), _DIGITS).tolist()
    n, mean, sd = len(differences), float(np.mean(differences)), _standard_deviation(differences)
    p_floor = 2 / 2**n if n <= EXACT_UP_TO else 2 / (RESAMPLES + 1)
    interval = p_equivalent = None
    # A t test needs spread: with none, its statistic is 0 / 0 or infinite.
    if np.ptp(differences) > 0:
        interval, p_equivalent = _t_tests(differences, margin)
    return Difference(n, mean, sd, interval, sign_flip_p(differences), p_floor, p_equivalent)


def _t_tests(differences: Sequence[float], margin: float) -> tuple[tuple[float, float], float]:
    """Return the interval of the mean, and the larger p of the two tests that it lies within `margin`."""
    # As `ttest_1samp` does, whose checks of its arguments take ten times as long as all of a comparison.
    n, mean = len(differences), np.mean(differences)
    error = np.sqrt(np.mean(np.subtract(differences, mean) ** 2) * (n / (n - 1)) / n)
    half = special.stdtrit(n - 1, 1 - LEVEL / 2) * error
    above, below = special.stdtr(n - 1, -(mean + margin) / error), special.stdtr(n - 1, (mean - margin) / error)
    return (float(mean - half), float(mean + half)), float(max(above, below))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values corrected for their number after Holm (1979).

    The probability to reject any true hypothesis stays at or below the level.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    # SciPy corrects for the false discovery rate only, which is the weaker claim.
    order = np.argsort(ps, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the sign-flip permutation test: that the mean difference is zero.

    Under that hypothesis, each difference is as likely with the other sign. Exact up to n = 16.

    Examples
    --------
    >>> sign_flip_p([1.0, 2.0, 3.0])  # two of the eight sums of flipped differences are as far from zero
    0.25
    """
    # Whole numbers, whose sums are exact: equal sums of flipped differences must count as equal.
    counts = np.rint(np.asarray(differences) * 10**_DIGITS)
    if len(counts) <= EXACT_UP_TO:
        # SciPy makes these one by one, which takes a hundred times as long.
        sums = _every_flip(len(counts)) @ counts
        return min(1.0, 2 * float(np.mean(sums >= abs(counts.sum()))))
    result = stats.permutation_test(
        (counts,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


@cache
def _every_flip(n: int) -> NDArray[np.float64]:
    """Return all ways to give `n` numbers a sign, a row each."""
    return np.array(list(product((1.0, -1.0), repeat=n)))
