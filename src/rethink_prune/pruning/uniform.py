"""Uniform pruning: the same share of every layer, decided before any training.

The baseline of architecture search: what an automatic method's architecture is worth is what it gains over this one at
the same size (Liu et al. 2019, section 5). Two kinds, by ``pruner.what``:

``channels``
    Every layer keeps ``int(N * (1 - ratio))`` of its N channels, at least one, as with ``l1``. The layers are those
    that ``slimming`` prunes, so inputs of pre-activation and dense blocks are among them.
``weights``
    Every convolution keeps as large a share of its single weights, at positions that the seed draws.

Nothing is inherited: `fresh` says which arms that leaves. A target of MACs or parameters is reached by one share.
"""

from typing import Literal

import torch
from torch import nn

from rethink_prune.config import ChannelOptions
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.fresh import FreshChannels, FreshPruner, FreshWeights, weight_options
from rethink_prune.pruning.pruner import Target


class UniformOptions(ChannelOptions):
    """The usual options, and whether channels or single weights go."""

    ranking: Literal["layer"] = "layer"
    what: Literal["channels", "weights"] = "channels"


class Uniform(FreshPruner[UniformOptions]):
    """Leaves the same share of every layer.

    :goes: channels, and inputs of pre-activation and dense blocks; or single weights (`what`); before any training
    :by: one share for all layers, with new weights alone: the baseline of architectures
    """

    name = "uniform"
    options_type = UniformOptions

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> Target:
        """Apply the share to a network."""
        name = network or type(model).__name__
        if self.options.what == "weights":
            return FreshWeights(weight_options(self.options), model, example, name, self.seed)
        return ChannelTarget(FreshChannels(self.options), model, example, name)
