"""L1-norm filter pruning (Li et al. 2017, *Pruning Filters for Efficient ConvNets*, arXiv:1608.08710).

Removes the filters with the smallest weights, all layers at once and independently of each other. The score of filter
``f`` of a convolution with weight ``W`` (C_out x C_in x k x k) is ::

    score(f) = sum over c, i, j of |W[f, c, i, j]|

Units that span several layers (``scope=all``, grouped convolutions) score the sum over their filters. Of a linear layer
that reads tokens, a filter is a row: that of a hidden unit, or those of a head's queries, keys and values, summed. Ties
keep the lower index, so the choice is deterministic. Linear layers of a classifier are left alone. The widths follow
from the options, not from the weights, so scratch arms can train without the large network, unless ``ranking=global``
compares all filters. Then each layer's sums are divided by their mean: raw sums grow with the number of a filter's
weights, so that layers with few inputs would go first, at random initialisation as well.

``A`` and ``B`` are the published targets: explicit widths for VGG-16, and for the ResNets a ratio per stage for the
first convolution of each block, apart from blocks the authors found sensitive.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import nn

from rethink_prune.config import ChannelOptions
from rethink_prune.pruning.channel_pruner import ChannelPruner, Groups, Scores, rows_of, score_units
from rethink_prune.pruning.pruner import Batches, Variant, Variants


def _basic_block_variant(blocks: Sequence[int], stage_ratios: Sequence[float], skipped_convs: Iterable[int]) -> Variant:
    """Return a published target of a ResNet with so many basic `blocks` per stage in terms of layer names.

    The publications number the convolutions from 1, the stem's, without projections; block ``b`` (from 0) holds
    ``2b + 2`` and ``2b + 3``, and only the even ones are pruned.
    """
    layers = [f"layer{stage}.{block}.conv1" for stage, count in enumerate(blocks, 1) for block in range(count)]
    return {
        "ratio": {f"layer{stage}.*": ratio for stage, ratio in enumerate(stage_ratios, 1) if ratio},
        "skip": [layers[(conv - 2) // 2] for conv in skipped_convs],
    }


# The authors found these sensitive; the last stage, with ratio 0, stays whole anyway.
_RESNET34_SKIPS = (2, 8, 14, 16, 26, 28, 30, 32)


def sums_over_filters(
    model: nn.Module, groups: Groups, measure: Callable[[torch.Tensor], torch.Tensor], *, comparable: bool = False
) -> Scores:
    """Return, for every unit of each group, the sum of a measure of its filters.

    Parameters
    ----------
    model : torch.nn.Module
    groups : sequence of ChannelGroup
        Of convolutions or linear layers.
    measure : callable
        From a layer's filters, C_out x (C_in k k) in float64, to one number for each.
    comparable : bool
        Divide the numbers of each layer by their mean, so that those of different layers can be ranked together.

    Examples
    --------
    >>> from rethink_prune.surgery.channels import ChannelGroup
    >>> group = ChannelGroup("0", "conv", ("0",), ({"0": (0,)}, {"0": (1,)}), {})
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1))
    >>> model[0].weight.data[:, 0, 0, 0] = torch.tensor([3.0, -4.0])
    >>> sums_over_filters(model, [group], lambda filters: filters.abs().sum(1))
    {'0': tensor([3., 4.], dtype=torch.float64)}
    """
    # A layer may be in several groups.
    layers = {layer for group in groups for layer in group.layers}
    measures = {n: measure(rows_of(model.get_submodule(n)).detach().double().flatten(1)) for n in layers}
    if comparable:  # a layer of zeros stays one
        measures = {name: values / values.mean().clamp(min=1e-300) for name, values in measures.items()}
    combine = torch.mean if comparable else torch.sum
    return {group.name: score_units(group.units, measures.__getitem__, combine) for group in groups}


class L1(ChannelPruner[ChannelOptions]):
    """Scores a filter by the sum of its absolute weights.

    :source: Li et al. 2017
    :goes: channels
    :by: smallest sum of absolute weights
    """

    name = "l1"
    position = 1
    variants: ClassVar[Variants] = {
        "vgg16": {"A": {"widths": [32, 64, 128, 128, *[256] * 9]}},
        "resnet56": {
            "A": _basic_block_variant((9, 9, 9), (0.1, 0.1, 0.1), (16, 20, 38, 54)),
            "B": _basic_block_variant((9, 9, 9), (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
        },
        "resnet110": {
            "A": _basic_block_variant((18, 18, 18), (0.5, 0.0, 0.0), (36,)),
            "B": _basic_block_variant((18, 18, 18), (0.5, 0.4, 0.3), (36, 38, 74)),
        },
        "torchvision.models:resnet34": {
            "A": _basic_block_variant((3, 4, 6, 3), (0.3, 0.3, 0.3, 0.0), _RESNET34_SKIPS),
            "B": _basic_block_variant((3, 4, 6, 3), (0.5, 0.6, 0.4, 0.0), _RESNET34_SKIPS),
        },
    }

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the summed absolute weights of every unit, in float64; comparable where all are ranked together."""
        together = self.options.ranking == "global"
        return sums_over_filters(model, groups, lambda filters: filters.abs().sum(1), comparable=together)

    @property
    def revision(self) -> int:
        """Two where all filters are ranked together: earlier versions ranked raw sums."""
        return 2 if self.options.ranking == "global" else 1
