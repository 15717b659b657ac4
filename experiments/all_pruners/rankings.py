"""Two numbers by which filters of all layers could be ranked together, to compare with what `l1` takes.

`l1` divides the sum of a filter's absolute weights by the mean of its layer.
"""

import torch
from torch import nn

from rethink_prune.pruning import ChannelPruner
from rethink_prune.pruning.channel_pruner import Groups, Scores
from rethink_prune.pruning.l1 import sums_over_filters
from rethink_prune.pruning.pruner import Batches


class Sums(ChannelPruner):
    """Ranks by the sum of absolute weights as it is: a filter with more inputs has the larger sum."""

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the sums."""
        return sums_over_filters(model, groups, lambda filters: filters.abs().sum(1))


class Means(ChannelPruner):
    """Ranks by the mean of absolute weights: layers of small weights still lose more."""

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the means."""
        return sums_over_filters(model, groups, lambda filters: filters.abs().mean(1))
