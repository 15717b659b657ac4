"""ThiNet (Luo, Wu, Lin 2017, *ThiNet: A Filter Level Pruning Method*, arXiv:1707.06342).

A channel goes if the next layer hardly misses it. Layer by layer, from the input on, single entries of the next layer's
output are drawn (random image, position and output channel). Without its bias, entry ``i`` is a sum over the channels
it reads::

    y[i] = sum over c of x[i, c],    x[i, c] = sum over kernel positions of (input of channel c) * (weight)

The channels ``T`` to remove are found greedily: starting from none, the channel joins that keeps
``sum over i of (sum over c in T of x[i, c])^2`` smallest. Then each channel that stays is scaled by the least-squares
solution of ``min over w: |y - x w|^2`` (of many, the one nearest to 1), which is folded into the next layer's weights.
All of this needs only the Gram matrix ``x^T x``.

A hidden unit behind tokens is a channel of the linear layer that reads it, and a token a position; a head is a channel
with as many inputs as it is wide, all scaled alike. Entries are drawn from all tokens.

Where several layers read the channels, their errors add up, and each is scaled by itself. Later layers are sampled
through the part that is already pruned. The paper fine-tunes for an epoch or two after every layer; here all training
comes after all pruning. The widths follow from the options alone.

``30``, ``50`` and ``70`` of ResNet-50 name the share of channels that both inner convolutions of each block keep.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from rethink_prune.config import Count, VariantName
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.pruner import Variant, Variants
from rethink_prune.pruning.reconstruction import ChannelReader, Reconstruction, ReconstructionPruner, SamplingOptions
from rethink_prune.pruning.samples import draw_places, pieces, read_patches
from rethink_prune.surgery.channels import ChannelGroup

Matrix = npt.NDArray[np.float64]

_VGG_CONV: Variant = {"widths": [32, 32, 64, 64, *[128] * 3, *[256] * 3, *[512] * 3]}
_VGG_TINY: Variant = {"widths": [16, 16, 32, 32, *[64] * 3, *[128] * 3, 128, 128, 256]}


def _bottleneck_variant(*widths: int) -> Variant:
    """Return a target of a ResNet that gives both inner convolutions of each block of a stage one width."""
    return {"widths": {f"layer{stage}.*.conv[12]": width for stage, width in enumerate(widths, 1)}}


class ThiNetOptions(SamplingOptions):
    """Options of :class:`ThiNet`: how much to sample."""

    entries_per_image: Count = 10
    variant: VariantName = None


class ThiNet(ReconstructionPruner[ThiNetOptions]):
    """Removes the channels that the next layer misses least, and scales those that stay.

    :source: Luo et al. 2017
    :goes: channels
    :by: least squared error of the next layer, chosen greedily; the rest is rescaled by least squares
    """

    name = "thinet"
    published_images = 10_000
    position = 2
    options_type = ThiNetOptions
    variants: ClassVar[Variants] = {
        "torchvision.models:vgg16": {"conv": _VGG_CONV},
        "vgg16_gap": {"gap": _VGG_CONV, "tiny": _VGG_TINY},
        "torchvision.models:resnet50": {
            "30": _bottleneck_variant(19, 38, 76, 153),
            "50": _bottleneck_variant(32, 64, 128, 256),
            "70": _bottleneck_variant(44, 89, 179, 358),
        },
    }

    def check_images(self, target: ChannelTarget, images: int) -> None:
        """Raise `UserError` if so many training images give fewer entries than a layer has channels."""
        for group, _ in target.narrowed():
            self._check_entries(group, images)

    def rewrite_readers(
        self, run: Reconstruction, group: ChannelGroup, width: int, readers: Sequence[ChannelReader]
    ) -> list[int]:
        """Choose greedily by the error of all readers, and scale what each reads of the units that stay."""
        # Errors of several readers add up, and so do their Gram matrices.
        grams = self._sample(run, group, readers)
        dropped = sorted(choose_greedily(sum(grams, np.zeros((group.size, group.size))), group.size - width))
        for reader, gram in zip(readers, grams, strict=True):
            scales = torch.from_numpy(least_squares_scales(gram, dropped)).to(run.current.device)
            weight = run.current.weight(reader.layer)
            weight[:, reader.columns] *= scales[reader.units, None]
            run.current.rewrite(reader.layer, weight)
        return dropped

    def _sample(self, run: Reconstruction, group: ChannelGroup, readers: Sequence[ChannelReader]) -> list[Matrix]:
        """Return for each reader the Gram matrix of the units' contributions to random entries of its output."""
        current = run.current
        weights = [current.weight(reader.layer)[:, reader.columns] for reader in readers]
        grams = [torch.zeros(group.size, group.size, dtype=torch.float64, device=current.device) for _ in readers]
        nodes = [node for reader in readers for node in reader.nodes]
        seen = 0
        for batch in run.images:
            seen += len(batch)
            read = current.read(nodes, batch)
            for reader, weight, gram in zip(readers, weights, grams, strict=True):
                layer = current.layer(reader.layer)
                for inputs, *_ in (read[node] for node in reader.nodes):
                    places = draw_places(layer, inputs, self.options.entries_per_image, run.generator)
                    for piece in pieces(places, layer.weight[0].numel()):
                        # Drawn on the CPU, so that the sample does not depend on the device.
                        filters = torch.randint(len(weight), (len(piece[0]),), generator=run.generator)
                        read_there = read_patches(layer, inputs, piece)[:, reader.columns]
                        parts = (read_there * weight[filters.to(current.device)]).sum(2)
                        # A unit sums its channels: several after a flatten.
                        x = parts.new_zeros(len(parts), group.size).index_add_(1, reader.units, parts)
                        gram.addmm_(x.T, x)
        self._check_entries(group, seen)
        for reader, gram in zip(readers, grams, strict=True):
            if not gram.isfinite().all():
                raise UserError(f"{reader.layer}: its weights or what it reads are not finite; thinet needs numbers")
        return [gram.cpu().numpy() for gram in grams]

    def _check_entries(self, group: ChannelGroup, available: int) -> None:
        options = self.options
        images = min(self.images, available)
        if images * options.entries_per_image < group.size:
            raise UserError(
                f"pruner.entries_per_image={options.entries_per_image}: with {images} images (pruner.images="
                f"{self.images}) too few for the {group.size} channels of {group.name}; "
                f"raise it or {self.limit_on_images(available)}"
            )


def choose_greedily(gram: Matrix, count: int) -> list[int]:
    """Return the channels whose sum is smallest in the least-squares sense, in the order in which they join.

    Parameters
    ----------
    gram : ndarray
        ``x^T x`` of the contributions, channels x channels.
    count : int
        How many to remove.

    Notes
    -----
    With channel ``j``, the error of ``T`` grows by ``2 * sum over t in T of gram[t, j] + gram[j, j]``. Ties go to the
    lower index.

    Examples
    --------
    >>> x = np.array([[1.0, 3.0, -1.0], [2.0, 0.0, -2.0]])  # the first and the last channel cancel each other
    >>> choose_greedily(x.T @ x, 2)
    [0, 2]
    """
    growth = gram.diagonal().copy()
    chosen: list[int] = []
    for _ in range(count):
        best = int(growth.argmin())
        chosen.append(best)
        growth += 2 * gram[best]
        growth[best] = np.inf  # chosen once
    return chosen


def least_squares_scales(gram: Matrix, dropped: Sequence[int]) -> Matrix:
    """Return the scale of every channel with which the kept ones best replace all: 0 for the dropped.

    Parameters
    ----------
    gram : ndarray
        ``x^T x`` of the contributions, channels x channels.
    dropped : sequence of int

    Notes
    -----
    Solves the normal equations of ``min over w: |x 1 - x_kept w|^2``; where many solutions are equally good, the one
    nearest to 1, so a channel of which the sample saw nothing keeps its weights.

    Examples
    --------
    >>> x = np.array([[1.0, 0.5], [2.0, 1.0]])  # the second channel is half of the first
    >>> least_squares_scales(x.T @ x, [1]).round(6).tolist()
    [1.5, 0.0]
    """
    stays = ~np.isin(np.arange(len(gram)), dropped)
    scales = np.zeros(len(gram))
    # Solved for the difference to 1: of many solutions, lstsq gives the one of smallest norm.
    scales[stays] = 1 + scipy.linalg.lstsq(gram[stays][:, stays], gram[stays][:, ~stays].sum(1))[0]
    return scales
