"""ThiNet (Luo, Wu, Lin 2017, *ThiNet: A Filter Level Pruning Method*, arXiv:1707.06342).

A channel goes if the next layer hardly misses it. Layer by layer, from the input on, single entries of the next layer's
output are drawn (random image, position and output channel). Without its bias, entry ``i`` is a sum over the channels
it reads::

    y[i] = sum over c of x[i, c],    x[i, c] = sum over kernel positions of (input of channel c) * (weight)

The channels ``T`` to remove are found greedily: starting from none, the channel joins that keeps
``sum over i of (sum over c in T of x[i, c])^2`` smallest. Then each channel that stays is scaled by the least-squares
solution of ``min over w: |y - x w|^2`` (of many, the one nearest to 1), which is folded into the next layer's weights.
All of this needs only the Gram matrix ``x^T x``.

Where several layers read the channels, their errors add up, and each is scaled by itself. Later layers are sampled
through the part that is already pruned. The paper fine-tunes for an epoch or two after every layer; here all training
comes after all pruning. The widths follow from the options alone.

``30``, ``50`` and ``70`` of ResNet-50 name the share of channels that both inner convolutions of each block keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from pydantic import field_validator
from torch import nn

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches, ChannelTarget, Choice, Pruner, PruneResult
from rethink_prune.pruning.samples import (
    FirstImages,
    Reader,
    WorkingCopy,
    draw_places,
    read_patches,
)
from rethink_prune.surgery.channels import ChannelGroup

Matrix = npt.NDArray[np.float64]

_VGG_CONV = {"widths": [32, 32, 64, 64, *[128] * 3, *[256] * 3, *[512] * 3]}
_VGG_TINY = {"widths": [16, 16, 32, 32, *[64] * 3, *[128] * 3, 128, 128, 256]}


def _resnet(*widths: int) -> Mapping[str, Any]:
    return {"widths": {f"layer{stage}.*.conv[12]": width for stage, width in enumerate(widths, 1)}}


class ThiNetOptions(ChannelOptions):
    """Options of :class:`ThiNet`: how much to sample."""

    ranking: Literal["layer"] = "layer"
    images: Count = 1000
    entries_per_image: Count = 10

    @field_validator("variant", mode="before")
    @classmethod
    def _variant_may_look_like_a_number(cls, variant: object) -> object:
        return str(variant) if isinstance(variant, int) else variant


class ThiNet(Pruner):
    """Removes the channels that the next layer misses least, and scales those that stay."""

    options_type = ThiNetOptions
    variants: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "torchvision.models:vgg16": {"conv": _VGG_CONV},
        "vgg16_gap": {"gap": _VGG_CONV, "tiny": _VGG_TINY},
        "torchvision.models:resnet50": {
            "30": _resnet(19, 38, 76, 153),
            "50": _resnet(32, 64, 128, 256),
            "70": _resnet(44, 89, 179, 358),
        },
    }
    needs_data = True

    def check_images(self, target: Any, images: int) -> None:
        """Raise `UserError` if so many training images give fewer entries than a layer has channels."""
        for group in target.groups:
            if target.widths[group.name] < group.size:
                self._check_entries(group, images)

    def prune(self, model: nn.Module, target: Any, *, data: Batches | None, generator: torch.Generator) -> PruneResult:
        """Go through the layers, then cut; `model` itself is untouched.

        Raises
        ------
        UserError
            If there are too few images, or if weights or activations are not finite.
        """
        scaled, drop = self.reconstruct(model, target, data=data, generator=generator)
        return target.cut(scaled, Choice(drop))

    def reconstruct(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches | None, generator: torch.Generator
    ) -> tuple[nn.Module, dict[str, list[int]]]:
        """Return a copy of `model` at full width with scaled weights, and the units to drop of each group."""
        assert target.widths is not None, "they follow from the options with ranking=layer"
        images = FirstImages(data, self.options.images, target.input_shape)
        current = WorkingCopy(model, images.device)
        drop: dict[str, list[int]] = {}
        for group in target.groups:
            removed = group.size - target.widths[group.name]
            if not removed:
                continue
            readers = current.readers(target.channels, group)
            grams = self._sample(current, group, readers, images, generator)
            drop[group.name] = sorted(choose_greedily(sum(grams, np.zeros((group.size, group.size))), removed))
            for reader, gram in zip(readers, grams, strict=True):
                scales = torch.from_numpy(least_squares_scales(gram, drop[group.name])).to(current.device)
                weight = current.weight(reader.layer)
                weight[:, reader.columns] *= scales[reader.units, None]
                current.rewrite(reader.layer, weight)
            current.remove(group, drop[group.name], readers)
        return current.rewritten(model), drop

    def _sample(
        self,
        current: WorkingCopy,
        group: ChannelGroup,
        readers: Sequence[Reader],
        images: FirstImages,
        generator: torch.Generator,
    ) -> list[Matrix]:
        """Return for each reader the Gram matrix of the units' contributions to random entries of its output."""
        weights = [current.weight(reader.layer)[:, reader.columns] for reader in readers]
        grams = [torch.zeros(group.size, group.size, dtype=torch.float64, device=current.device) for _ in readers]
        nodes = [node for reader in readers for node in reader.nodes]
        seen = 0
        for batch in images:
            seen += len(batch)
            read = current.read(nodes, batch)
            for reader, weight, gram in zip(readers, weights, grams, strict=True):
                layer = current.layer(reader.layer)
                for inputs, *_ in (read[node] for node in reader.nodes):
                    places = draw_places(layer, inputs, self.options.entries_per_image, generator)
                    for piece in places.pieces(layer.weight[0].numel()):
                        filters = torch.randint(len(weight), (len(piece),), generator=generator)
                        read_there = read_patches(layer, inputs, piece)[:, reader.columns]
                        parts = (read_there * weight[filters.to(current.device)]).sum(2)
                        x = parts.new_zeros(len(piece), group.size).index_add_(1, reader.units, parts)
                        gram.addmm_(x.T, x)
        self._check_entries(group, seen)
        for reader, gram in zip(readers, grams, strict=True):
            if not gram.isfinite().all():
                raise UserError(f"{reader.layer}: its weights or what it reads are not finite; thinet needs numbers")
        return [gram.cpu().numpy() for gram in grams]

    def _check_entries(self, group: ChannelGroup, available: int) -> None:
        options = self.options
        images = min(options.images, available)
        if images * options.entries_per_image < group.size:
            more_images = "pruner.images" if available >= options.images else "the number of training images"
            raise UserError(
                f"pruner.entries_per_image={options.entries_per_image}: with {images} images (pruner.images="
                f"{options.images}) too few for the {group.size} channels of {group.name}; "
                f"raise it or {more_images}"
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
    """
    growth = gram.diagonal().copy()
    chosen: list[int] = []
    for _ in range(count):
        best = int(growth.argmin())
        chosen.append(best)
        growth += 2 * gram[best]
        growth[best] = np.inf
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
    """
    stays = ~np.isin(np.arange(len(gram)), dropped)
    scales = np.zeros(len(gram))
    scales[stays] = 1 + scipy.linalg.lstsq(gram[stays][:, stays], gram[stays][:, ~stays].sum(1))[0]
    return scales
