"""Least squares from products alone: a LASSO that selects channels, and a ridge that reconstructs weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from scipy.linalg import lapack

Matrix = npt.NDArray[np.float64]

# A channel that others replace but for this share of the largest channel's energy counts as their linear combination.
_DEPENDENT = 1e-10
# From largest to smallest: from weights as they were to free ones.
_RIDGES = (1e3, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)


@dataclass
class Products:
    """What least squares needs of a sample: products of what a layer reads and of the outputs it should give.

    Attributes
    ----------
    xx : torch.Tensor
        ``x^T x``, features x features, in float64. A feature is one kernel position of one channel.
    xy : torch.Tensor
        ``x^T y``, features x outputs.
    yy : float
        ``|y|^2``.
    x, y : torch.Tensor
        The sums of both, one number for each feature and for each output.
    count : int
        How many positions were sampled.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    yy: float = 0.0
    count: int = 0

    @classmethod
    def zeros(cls, features: int, outputs: int, device: torch.device) -> Products:
        """Return the products of an empty sample."""
        xx = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(xx, xx.new_zeros(features, outputs), xx.new_zeros(features), xx.new_zeros(outputs))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add positions: `x` as n x features, `y` as n x outputs, both in float64."""
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += float(y.square().sum())
        self.count += len(x)

    def of(self, features: torch.Tensor) -> Products:
        """Return the products of some features alone: `features` is a mask."""
        part = self.xx[features][:, features], self.xy[features], self.x[features]
        return Products(*part, self.y, self.yy, self.count)

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of `x` and `y`."""
        return self.x / max(1, self.count), self.y / max(1, self.count)

    def about(self, x: torch.Tensor, y: torch.Tensor) -> Products:
        """Return the products of the sample after these values were taken off.

        Examples
        --------
        >>> products = Products.zeros(1, 1, torch.device("cpu"))
        >>> values = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        >>> products.add(values, 2 * values)
        >>> centred = products.about(*products.means)
        >>> centred.xx.item(), centred.xy.item(), centred.yy
        (2.0, 4.0, 8.0)
        """
        xx = self.xx - torch.outer(self.x, x) - torch.outer(x, self.x) + self.count * torch.outer(x, x)
        xy = self.xy - torch.outer(self.x, y) - torch.outer(x, self.y) + self.count * torch.outer(x, y)
        yy = self.yy - float(2 * y @ self.y - self.count * y @ y)
        return Products(xx, xy, self.x - self.count * x, self.y - self.count * y, yy, self.count)

    def __add__(self, other: Products) -> Products:
        """Return the products of both samples together."""
        sums = self.xx + other.xx, self.xy + other.xy, self.x + other.x, self.y + other.y
        return Products(*sums, self.yy + other.yy, self.count + other.count)

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity was among the values."""
        return np.isfinite(self.yy) and bool(self.xx.diagonal().isfinite().all())

    def error(self, weight: torch.Tensor) -> float:
        """Return ``|y - x W^T|^2 / |y|^2`` for a weight of C_out x channels x K."""
        flat = weight.flatten(1)
        residual = self.yy + float(((flat @ self.xx) * flat).sum() - 2 * (flat.T * self.xy).sum())
        return residual / self.yy if self.yy else 0.0


def select_by_lasso(gram: Matrix, correlation: Matrix, count: int) -> list[int]:
    """Return the channels that a LASSO leaves.

    Parameters
    ----------
    gram : ndarray
        ``Z^T Z`` of the contributions of the channels, channels x channels.
    correlation : ndarray
        ``Z^T y``: one number per channel.
    count : int
        How many to keep.

    Returns
    -------
    list of int
        The channels with a coefficient at the smallest penalty that leaves no more than `count`. Where these are fewer,
        because the path jumps over `count` or ends early, those with the largest absolute coefficients at the next
        point of the path join, and after them those that the others replace least.

    Examples
    --------
    >>> z = np.array([[1.0, 0.0, 0.1], [0.0, 2.0, 0.0]])
    >>> select_by_lasso(z.T @ z, z.T @ z.sum(1), 2)
    [0, 1]
    """
    # Takes a second to import, and other pruners do without.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    scale = gram.diagonal().max()
    if not scale > 0:  # no channel contributes anything
        return list(range(count))
    # The selection does not depend on the scale, but tolerances do.
    gram, correlation = gram / scale, correlation / scale
    # The path breaks down at linear combinations. Pivoting sets them apart, and orders by what is new in each channel.
    _, pivots, rank, _ = lapack.dpstrf(gram, tol=_DEPENDENT, lower=1)
    by_novelty = np.asarray(pivots) - 1
    independent = np.sort(by_novelty[:rank])
    with warnings.catch_warnings():
        # A path that ends where the penalty is within rounding of zero has said all it can.
        warnings.simplefilter("ignore", ConvergenceWarning)
        among = gram[np.ix_(independent, independent)]
        # The number of samples scales the penalties alone.
        _, _, coefficients = lars_path_gram(
            correlation[independent], among, n_samples=1, max_iter=8 * len(gram), method="lasso"
        )
    path = np.zeros((len(gram), coefficients.shape[1]))
    path[independent] = np.abs(coefficients)
    last = int(np.flatnonzero((path > 0).sum(0) <= count)[-1])
    following = path[:, min(last + 1, path.shape[1] - 1)]
    novelty = np.empty(len(gram))
    novelty[by_novelty] = np.arange(len(gram), 0, -1)
    # The last key counts first: on the path, then by coefficient, then by novelty.
    best_first = np.lexsort((-novelty, -following, path[:, last] == 0))
    return sorted(best_first[:count].tolist())


def ridge_towards(old: Matrix, xx: Matrix, xy: Matrix, ridge: float) -> Matrix:
    """Return ``argmin over W: |y - x W|^2 + rho * |W - old|^2`` with ``rho = ridge * mean(diag(xx))``.

    Parameters
    ----------
    old : ndarray
        Features x outputs.
    xx, xy : ndarray
        ``x^T x`` and ``x^T y``; `xx` is overwritten.
    ridge : float
        Relative to the mean of the diagonal of `xx`.

    Notes
    -----
    ``|y - x W|^2`` is never above ``|y - x old|^2``, because `old` itself pays no penalty.

    Examples
    --------
    >>> ridge_towards(np.array([[0.0]]), np.array([[1.0]]), np.array([[3.0]]), ridge=0.5).tolist()
    [[2.0]]
    """
    rho = ridge * xx.diagonal().mean()
    if not rho > 0:  # nothing but zeros is read
        return old
    right = xy + rho * old
    xx[np.diag_indices_from(xx)] += rho
    return scipy.linalg.solve(xx, right, assume_a="pos", overwrite_a=True, overwrite_b=True)


def best_ridge(old: Matrix, fit: Products, held_out: Products) -> float:
    """Return the ridge whose fit has the least error on what was held out; the largest of equals.

    Examples
    --------
    >>> x, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> fit, held_out = (Products.zeros(2, 1, x.device) for _ in range(2))
    >>> fit.add(x, y)
    >>> held_out.add(x, y)
    >>> best_ridge(np.zeros((2, 1)), fit, held_out)  # both ask for other weights than zero, so the smallest
    1e-06
    """
    errors = {}
    for ridge in _RIDGES:
        # A copy: `xx` is overwritten.
        fitted = ridge_towards(old, fit.xx.cpu().numpy().copy(), fit.xy.cpu().numpy(), ridge)
        errors[ridge] = held_out.error(torch.from_numpy(fitted.T.copy()).to(held_out.xx.device))
    return min(errors, key=errors.__getitem__)
