"""FPGM (He et al. 2019, *Filter Pruning via Geometric Median*, CVPR, arXiv:1811.00250).

Removes the filters nearest to the geometric median of their layer: what they do, the others can do for them, whatever
their norms are. The filter nearest to the median is that with the smallest sum of distances to all filters. With the
filters ``W[f]`` of a layer (C_in k k numbers each), ::

    score(f) = sum over j of |W[f] - W[j]|_2

and the lowest scores go. Units that span several layers (``scope=all``, grouped convolutions) score the sum over their
filters. Ties keep the lower index. The widths follow from the options, not from the weights, unless ``ranking=global``
compares all filters: then each layer's sums are divided by their mean, as for `l1`, because they grow with the number
of filters and of their weights.

The authors zero filters after each epoch of a training and let them grow again, as `soft_filter` does, and may remove
filters of small norm as well; here the criterion alone is applied, once, to a trained network.
"""

import torch
from torch import nn

from rethink_prune.config import ChannelOptions
from rethink_prune.pruning.channel_pruner import ChannelPruner, Groups, Scores
from rethink_prune.pruning.l1 import sums_over_filters
from rethink_prune.pruning.pruner import Batches


class FPGM(ChannelPruner[ChannelOptions]):
    """Scores a filter by its distances to the other filters of its layer.

    :source: He et al. 2019
    :goes: channels
    :by: smallest sum of distances to the layer's other filters
    """

    name = "fpgm"

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the summed distances of every unit, in float64; comparable where all are ranked together."""
        together = self.options.ranking == "global"
        return sums_over_filters(model, groups, sums_of_distances, comparable=together)


def sums_of_distances(filters: torch.Tensor) -> torch.Tensor:
    """Return the sum of each filter's Euclidean distances to all.

    Parameters
    ----------
    filters : torch.Tensor
        C_out x (C_in k k).

    Examples
    --------
    >>> sums_of_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    tensor([15., 10., 15.])
    """
    # Not by a product of matrices, which rounds small distances away.
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
