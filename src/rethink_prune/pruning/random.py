"""Random pruning: the baseline. What a criterion is worth is what it gains over this at the same widths.

Every unit gets a uniformly drawn score; the lowest go, layer by layer, so the widths are those of any other pruner with
the same ratio. The draw follows the study's seed.
"""

import torch
from torch import nn

from rethink_prune.config import ChannelOptions
from rethink_prune.pruning.channel_pruner import ChannelPruner, Groups, Scores
from rethink_prune.pruning.pruner import Batches


class Random(ChannelPruner[ChannelOptions]):
    """Scores at random.

    :goes: channels
    :by: chance: the baseline
    """

    name = "random"

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return uniform draws from [0, 1), one per unit, in float64."""
        return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}
