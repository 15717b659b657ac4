"""Channel pruning by regression (He, Zhang, Sun 2017, *Channel Pruning for Accelerating Very Deep Neural Networks*).

arXiv:1707.06168. Layer by layer, from the input on, for random positions in the output of the layer that reads the
channels. With ``x[c]`` what it reads of channel ``c``, ``W[c]`` its weights for that, and ``y`` its output without bias
in the unpruned network:

1. LASSO selects the channels, with as large a penalty as leaves the wanted number of coefficients ``beta``::

       min over beta: |y - sum over c of beta[c] * x[c] W[c]^T|^2 / 2 + penalty * |beta|_1

2. Least squares reconstructs the output from those ``x_S`` that stay, with a ridge towards the weights they have. So
   the error on the sample is never above that of removing the channels and leaving the weights as they are::

       min over W': |y - x_S W'^T|^2 + rho * |W' - W_S|^2,    rho = ridge * mean of the diagonal of x_S^T x_S

   The ridge is the one, of powers of ten, with the least error on every fifth image, which the fit leaves out at first:
   a sample of hardly more positions than a filter has weights would otherwise be fitted, and nothing else.

``x`` is sampled through the part that is already pruned, ``y`` in the unpruned network: errors do not pile up. Where
the layer's output is added to a shortcut, ``y`` also makes up for the shortcut's error, as seen through the batch norm
in between. The first convolution of a branch selects channels of the stream, which stays whole for the shortcut.
Where several layers read the channels, the selection is for the sum of their errors, and each is reconstructed by
itself. All of this needs only the Gram matrices ``x^T x`` and ``x^T y``; the first takes 8 bytes times the square of
the number of weights of one filter. The paper alternates selection and reconstruction and finds that once is enough.

``5x`` of VGG-16 and ``2x`` of ResNet-50 are the published targets, named after how much faster they are meant to be.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from pydantic import Field
from scipy.linalg import lapack
from torch import nn

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches, ChannelTarget, Choice, Pruner, PruneResult
from rethink_prune.pruning.samples import (
    FirstImages,
    Reader,
    Shortcut,
    WorkingCopy,
    draw_places,
    output_positions,
    read_outputs,
    read_patches,
)
from rethink_prune.surgery.channels import ChannelGroup

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float64]

# Channels of a batch norm that scales them by less than this share of its largest scale do not make up for a shortcut's
# error: they would have to grow a hundredfold.
_SMALL_SCALE = 0.01
# A channel that others replace but for this share of the largest channel's energy counts as their linear combination.
_DEPENDENT = 1e-10

# Every fifth image is held out to choose the ridge, from largest to smallest: from weights as they were to free ones.
_HELD_OUT = 5
_RIDGES = (1e3, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
# The products of their pairs take 2 GiB.
_MOST_FEATURES = 16_384

# For each block of ResNet-50: channels selected from the stream, outputs of the first and of the second convolution.
_RESNET50_2X = {
    "layer1": [(35, 64, 55), (101, 51, 39), (97, 50, 37)],
    "layer2": [(144, 128, 106), (205, 105, 72), (198, 105, 72), (288, 128, 110)],
    "layer3": [
        (278, 256, 225), (418, 209, 147), (407, 204, 158), (423, 212, 155), (412, 211, 148), (595, 256, 213)
    ],
    "layer4": [(606, 512, 433), (1222, 512, 437), (1147, 512, 440)],
}  # fmt: skip


class RegressionOptions(ChannelOptions):
    """Options of :class:`Regression`: how much to sample, and the ridge in units of the mean squared input.

    Without `ridge`, held-out images decide it.
    """

    ranking: Literal["layer"] = "layer"
    images: Count = 1000
    positions_per_image: Count = 10
    # A smaller ridge would leave the equations singular to within rounding.
    ridge: Annotated[float, Field(ge=1e-10, allow_inf_nan=False)] | None = None


class Regression(Pruner):
    """Selects channels by LASSO, and reconstructs what reads them by least squares."""

    options_type = RegressionOptions
    variants: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "torchvision.models:vgg16": {
            "5x": {"widths": [24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512]},
        },
        "torchvision.models:resnet50": {
            "2x": {
                "widths": {
                    f"{stage}.{block}.{layer}": width
                    for stage, blocks in _RESNET50_2X.items()
                    for block, widths in enumerate(blocks)
                    for layer, width in zip(("conv1.selected", "conv1", "conv2"), widths, strict=True)
                }
            }
        },
    }
    selecting = "conv"
    needs_data = True

    def check_images(self, target: Any, images: int) -> None:
        """Raise `UserError` if so many training images give fewer positions than a layer has channels."""
        positions = output_positions(target.shapes, target.input_shape)
        images = min(images, self.options.images)
        for group in target.groups:
            if target.widths[group.name] < group.size:
                readers = target.channels.inputs(group)
                for name, units in readers.items():
                    kernel = target.shapes.get_parameter(f"{name}.weight")[0, 0].numel()
                    _check_features(name, group, sum(map(len, units)) * kernel)
                per_image = sum(min(positions.get(name, 0), self.options.positions_per_image) for name in readers)
                self._check_positions(group, images * per_image, images)

    def prune(self, model: nn.Module, target: Any, *, data: Batches | None, generator: torch.Generator) -> PruneResult:
        """Go through the layers, then cut; `model` itself is untouched.

        Raises
        ------
        UserError
            If there are too few images, or if weights or activations are not finite.
        """
        reconstructed, drop = self.reconstruct(model, target, data=data, generator=generator)
        return target.cut(reconstructed, Choice(drop))

    def reconstruct(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches | None, generator: torch.Generator
    ) -> tuple[nn.Module, dict[str, list[int]]]:
        """Return a copy of `model` at full width with reconstructed weights, and the units to drop of each group."""
        assert target.widths is not None, "they follow from the options with ranking=layer"
        images = FirstImages(data, self.options.images, target.input_shape)
        original, current = WorkingCopy(model, images.device), WorkingCopy(model, images.device)
        drop: dict[str, list[int]] = {}
        for group in target.groups:
            if target.widths[group.name] == group.size:
                continue
            readers = current.readers(target.channels, group)
            weights = [current.weight(reader.layer)[:, reader.columns] for reader in readers]
            for reader, weight in zip(readers, weights, strict=True):
                _check_features(reader.layer, group, weight[0].numel())
            samples = [Sample.empty(weight[0].numel(), len(weight), images.device) for weight in weights]
            seen = self._sample(original, current, readers, samples, images, generator)
            self._check_positions(group, sum(each.fit.count + each.held_out.count for each in samples), seen)
            kept = _select(group, target.widths[group.name], readers, weights, samples)
            drop[group.name] = sorted(set(range(group.size)) - set(kept))
            for reader, weight, each in zip(readers, weights, samples, strict=True):
                self._reconstruct_reader(current, reader, weight, each, kept)
            current.remove(group, drop[group.name], readers)
        return current.rewritten(model), drop

    def _sample(
        self,
        original: WorkingCopy,
        current: WorkingCopy,
        readers: Sequence[Reader],
        samples: Sequence[Sample],
        images: FirstImages,
        generator: torch.Generator,
    ) -> int:
        """Fill the sample of each reader; return how many images there were."""
        shortcuts = {node: current.shortcut(node) for reader in readers for node in reader.nodes}
        nodes = set(shortcuts) | {shortcut.addition for shortcut in shortcuts.values() if shortcut is not None}
        seen = 0
        for batch in images:
            now, before = current.read(nodes, batch), original.read(nodes, batch)
            for reader, each in zip(readers, samples, strict=True):
                layer, full = current.layer(reader.layer), original.weight(reader.layer).flatten(1)
                others = current.weight(reader.layer)
                others[:, reader.columns] = 0
                for node in reader.nodes:
                    inputs, shortcut = now[node][0], shortcuts[node]
                    places = draw_places(layer, inputs, self.options.positions_per_image, generator, distinct=True)
                    for piece in places.pieces(full.shape[1]):
                        x = read_patches(layer, inputs, piece)
                        y = read_patches(layer, before[node][0], piece).flatten(1) @ full.T
                        y -= x.flatten(1) @ others.flatten(1).T  # channels outside the group remain
                        if shortcut is not None and _same_shape(*now[shortcut.addition]):
                            values = (read[shortcut.addition][shortcut.operand] for read in (before, now))
                            then, today = (read_outputs(layer, value, piece) for value in values)
                            y += (then - today) * _gain(current, shortcut, y.shape[1])
                        held_out = (piece.image + seen) % _HELD_OUT == _HELD_OUT - 1
                        each.add(x[:, reader.columns].flatten(1), y, held_out)
                if not (each.fit.finite and each.held_out.finite):
                    raise UserError(
                        f"{reader.layer}: its weights or what it reads are not finite; regression needs numbers"
                    )
            seen += len(batch)
        return seen

    def _reconstruct_reader(
        self, current: WorkingCopy, reader: Reader, weight: torch.Tensor, sample: Sample, kept: Sequence[int]
    ) -> None:
        """Fit the weights of a layer for the units that are kept, and write them into the working copy."""
        stays = torch.isin(reader.units, torch.tensor(kept, device=current.device))
        features = stays.repeat_interleave(weight.shape[2])
        removal = weight * stays[:, None]
        old = removal.flatten(1)[:, features].T.cpu().numpy()
        ridge = self.options.ridge or _best_ridge(old, sample.fit.of(features), sample.held_out.of(features))
        products = sample.whole
        part = products.of(features)
        fitted = ridge_towards(old, part.xx.cpu().numpy(), part.xy.cpu().numpy(), ridge)
        new = torch.zeros_like(removal)
        new[:, stays] = torch.from_numpy(fitted.T.copy()).to(new).reshape(len(new), -1, new.shape[2])
        whole = current.weight(reader.layer)
        whole[:, reader.columns] = new
        current.rewrite(reader.layer, whole)
        log.info(
            "%s: keeps %d input channels; error %.4f after removal, %.4f after reconstruction (ridge %.0e)",
            reader.layer,
            int(stays.sum()),
            products.error(removal),
            products.error(new),
            ridge,
        )

    def _check_positions(self, group: ChannelGroup, positions: int, images: int) -> None:
        options = self.options
        if positions >= group.size:
            return
        limit = "pruner.images" if images >= options.images else "the number of training images"
        raise UserError(
            f"pruner.positions_per_image={options.positions_per_image}: {images} images (pruner.images="
            f"{options.images}) give {positions} positions, too few for the {group.size} channels of {group.name}; "
            f"raise {limit}, or pruner.positions_per_image if the layer's output has more positions"
        )


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
    count : int
        How many positions were sampled.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: float = 0.0
    count: int = 0

    @classmethod
    def zeros(cls, features: int, outputs: int, device: torch.device) -> Products:
        """Return the products of an empty sample."""
        xx = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(xx, xx.new_zeros(features, outputs))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add positions: `x` as n x features, `y` as n x outputs, both in float64."""
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += float(y.square().sum())
        self.count += len(x)

    def of(self, features: torch.Tensor) -> Products:
        """Return the products of some features alone: `features` is a mask."""
        return Products(self.xx[features][:, features], self.xy[features], self.yy, self.count)

    def __add__(self, other: Products) -> Products:
        """Return the products of both samples together."""
        return Products(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.count + other.count)

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity was among the values."""
        return np.isfinite(self.yy) and bool(self.xx.diagonal().isfinite().all())

    def error(self, weight: torch.Tensor) -> float:
        """Return ``|y - x W^T|^2 / |y|^2`` for a weight of C_out x channels x K."""
        flat = weight.flatten(1)
        residual = self.yy + float(((flat @ self.xx) * flat).sum() - 2 * (flat.T * self.xy).sum())
        return residual / self.yy if self.yy else 0.0


@dataclass(frozen=True)
class Sample:
    """The positions of most images, to fit weights to, and those of the others, to choose the ridge by."""

    fit: Products
    held_out: Products

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Sample:
        """Return a sample without positions."""
        return cls(*(Products.zeros(features, outputs, device) for _ in range(2)))

    @property
    def whole(self) -> Products:
        """The products of all positions."""
        return self.fit + self.held_out

    def add(self, x: torch.Tensor, y: torch.Tensor, held_out: torch.Tensor) -> None:
        """Add positions, as to `Products`; the mask `held_out` tells which are not for the fit."""
        self.fit.add(x[~held_out], y[~held_out])
        self.held_out.add(x[held_out], y[held_out])


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
    """
    # Takes a second to import, and other pruners do without.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    scale = gram.diagonal().max()
    if not scale > 0:  # no channel contributes anything
        return list(range(count))
    gram, correlation = gram / scale, correlation / scale
    # The path breaks down at linear combinations. Pivoting sets them apart, and orders by what is new in each channel.
    _, pivots, rank, _ = lapack.dpstrf(gram, tol=_DEPENDENT, lower=1)
    by_novelty = np.asarray(pivots) - 1
    independent = np.sort(by_novelty[:rank])
    with warnings.catch_warnings():
        # A path that ends where the penalty is within rounding of zero has said all it can.
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, _, coefficients = lars_path_gram(
            correlation[independent],
            gram[np.ix_(independent, independent)],
            n_samples=1,
            max_iter=8 * len(gram),
            method="lasso",
        )
    path = np.zeros((len(gram), coefficients.shape[1]))
    path[independent] = np.abs(coefficients)
    last = int(np.flatnonzero((path > 0).sum(0) <= count)[-1])
    following = path[:, min(last + 1, path.shape[1] - 1)]
    novelty = np.empty(len(gram))
    novelty[by_novelty] = np.arange(len(gram), 0, -1)
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
    """
    rho = ridge * xx.diagonal().mean()
    if not rho > 0:  # nothing but zeros is read
        return old
    right = xy + rho * old
    xx[np.diag_indices_from(xx)] += rho
    return scipy.linalg.solve(xx, right, assume_a="pos", overwrite_a=True, overwrite_b=True)


def _best_ridge(old: Matrix, fit: Products, held_out: Products) -> float:
    """Return the ridge whose fit has the least error on what was held out; the largest of equals."""
    errors = {}
    for ridge in _RIDGES:
        fitted = ridge_towards(old, fit.xx.cpu().numpy().copy(), fit.xy.cpu().numpy(), ridge)
        errors[ridge] = held_out.error(torch.from_numpy(fitted.T.copy()).to(held_out.xx.device))
    return min(errors, key=errors.__getitem__)


def _check_features(layer: str, group: ChannelGroup, features: int) -> None:
    """Refuse a layer of which the products would not fit into memory: a linear one behind a flatten, as a rule."""
    if features > _MOST_FEATURES:
        raise UserError(
            f"pruner.name=regression: {layer} reads {features:,} numbers for the channels of {group.name}, and the "
            f"products of their pairs take {8 * features**2 / 2**30:.1f} GiB, several times; leave them whole: "
            f"pruner.skip=[{group.name}]"
        )


def _select(
    group: ChannelGroup,
    width: int,
    readers: Sequence[Reader],
    weights: Sequence[torch.Tensor],
    samples: Sequence[Sample],
) -> list[int]:
    """Return the units to keep, by the sum of the errors of all readers."""
    gram, correlation = np.zeros((group.size, group.size)), np.zeros(group.size)
    for reader, weight, each in zip(readers, weights, (sample.whole for sample in samples), strict=True):
        flat, units = weight.flatten(1), reader.units.repeat_interleave(weight.shape[2])
        # Entry (a, b): inner product of what features a and b contribute to all outputs. Units sum their features.
        of_features = (flat.T @ flat).mul_(each.xx)
        rows = of_features.new_zeros(group.size, len(units)).index_add_(0, units, of_features)
        gram += rows.new_zeros(group.size, group.size).index_add_(1, units, rows).cpu().numpy()
        aligned = (flat.T * each.xy).sum(1)
        correlation += aligned.new_zeros(group.size).index_add_(0, units, aligned).cpu().numpy()
    return select_by_lasso(gram, correlation, width)


def _same_shape(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether an addition broadcasts neither operand; a value per image, say, is no shortcut."""
    return first.shape == second.shape


def _gain(current: WorkingCopy, shortcut: Shortcut, channels: int) -> torch.Tensor:
    """Return by how much a layer's output channels change for a change of one after the batch norm that follows."""
    gain = torch.ones(channels, dtype=torch.float64, device=current.device)
    if shortcut.norm is not None:
        norm = current.layer(shortcut.norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale *= norm.weight.detach().double()
        usable = scale.abs() > _SMALL_SCALE * scale.abs().max()
        gain = torch.where(usable, 1 / scale, 0.0)
    return gain
