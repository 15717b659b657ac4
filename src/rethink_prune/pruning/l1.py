"""L1-norm filter pruning (Li et al. 2017, *Pruning Filters for Efficient ConvNets*, arXiv:1608.08710).

Removes the filters with the smallest weights, all layers at once and independently of each other. The score of filter
``f`` of a convolution with weight ``W`` (C_out x C_in x k x k) is ::

    score(f) = sum over c, i, j of |W[f, c, i, j]|

Units that span several layers (``scope=all``, grouped convolutions) score the sum over their filters. Ties keep the
lower index, so the choice is deterministic. Linear layers are left alone. The widths follow from the options, not from
the weights, so scratch arms can train without the large network (unless ``ranking=global`` compares all filters).

``A`` and ``B`` are the published targets: explicit widths for VGG-16, and for the ResNets a ratio per stage for the
first convolution of each block, apart from blocks the authors found sensitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from rethink_prune.pruning.pruner import Batches, Pruner
from rethink_prune.surgery.channels import ChannelGroup


def _resnet(blocks: Sequence[int], stage_ratios: Sequence[float], skipped_convs: Iterable[int]) -> Mapping[str, Any]:
    """Say a published target of a ResNet with so many basic `blocks` per stage in terms of layer names.

    The publications number the convolutions from 1, the stem's, without projections; block ``b`` (from 0) holds
    ``2b + 2`` and ``2b + 3``, and only the even ones are pruned.
    """
    layers = [f"layer{stage}.{block}.conv1" for stage, count in enumerate(blocks, 1) for block in range(count)]
    return {
        "ratio": {f"layer{stage}.*": ratio for stage, ratio in enumerate(stage_ratios, 1) if ratio},
        "skip": [layers[(conv - 2) // 2] for conv in skipped_convs],
    }


_RESNET34_SKIPS = (2, 8, 14, 16, 26, 28, 30, 32)


def sums_over_filters(
    model: nn.Module, groups: Sequence[ChannelGroup], measure: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return, for every unit of each group, the sum of a measure of its filters.

    Parameters
    ----------
    model : torch.nn.Module
    groups : sequence of ChannelGroup
        Of convolutions or linear layers.
    measure : callable
        From a layer's filters, C_out x (C_in k k) in float64, to one number for each.
    """
    measured = {
        layer: measure(model.get_parameter(f"{layer}.weight").detach().double().flatten(1))
        for group in groups
        for layer in group.layers
    }
    return {
        group.name: torch.stack(
            [
                torch.cat([measured[layer][list(positions)] for layer, positions in unit.items()]).sum()
                for unit in group.units
            ]
        )
        for group in groups
    }


class L1(Pruner):
    """Scores a filter by the sum of its absolute weights."""

    variants: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "vgg16": {"A": {"widths": [32, 64, 128, 128, *[256] * 9]}},
        "resnet56": {
            "A": _resnet((9, 9, 9), (0.1, 0.1, 0.1), (16, 20, 38, 54)),
            "B": _resnet((9, 9, 9), (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
        },
        "resnet110": {
            "A": _resnet((18, 18, 18), (0.5, 0.0, 0.0), (36,)),
            "B": _resnet((18, 18, 18), (0.5, 0.4, 0.3), (36, 38, 74)),
        },
        "torchvision.models:resnet34": {
            "A": _resnet((3, 4, 6, 3), (0.3, 0.3, 0.3, 0.0), _RESNET34_SKIPS),
            "B": _resnet((3, 4, 6, 3), (0.5, 0.6, 0.4, 0.0), _RESNET34_SKIPS),
        },
    }

    def scores(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        data: Batches | None,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Return the summed absolute weights of every unit, in float64; `data` and `generator` are not used."""
        return sums_over_filters(model, groups, lambda filters: filters.abs().sum(1))
