"""LAMP (Lee et al. 2021, *Layer-adaptive Sparsity for the Magnitude-based Pruning*, ICLR, arXiv:2010.07611).

Ranks all weights together by the square of a weight divided by the sum of the squares of its layer that are not
smaller, itself included. With the weights ``w`` of a layer in ascending order of ``|w|`` ::

    score(u) = w[u]^2 / sum over v >= u of w[v]^2

The largest weight of every layer scores 1, so the ranking empties no layer, and the scale of a layer takes no part.
``pruner=magnitude pruner.distribution=lamp`` is the same. Of a network that was pruned before, the sums are those of
the weights that remain. Of equal weights, that with the lower index scores higher; zeros score 0.

See `weight_pruner` for the threshold and for masks.
"""

import torch
from torch import nn

from rethink_prune.pruning.pruner import Batches
from rethink_prune.pruning.weight_pruner import WeightOptions, WeightPruner, WeightScores, WeightTarget


class Lamp(WeightPruner[WeightOptions]):
    """Masks the weights of smallest layer-adaptive magnitude.

    :source: Lee et al. 2021
    :goes: single weights
    :by: square of a weight, as a share of the squares of its layer that are not smaller; masks
    """

    name = "lamp"
    in_rounds = True

    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return the layer-adaptive magnitudes in float64; weights that are gone are zeros, and change no sum."""
        return {name: lamp_scores(weight.detach().abs().flatten()) for name, weight in target.weights(model).items()}


def lamp_scores(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the layer-adaptive magnitudes of a layer's weights (Lee et al. 2021), in float64.

    Examples
    --------
    >>> lamp_scores(torch.tensor([1.0, 3.0, 2.0])).mul(14).round().tolist()  # 1/14, 9/9 and 4/13
    [1.0, 14.0, 4.0]
    """
    # Stable, so that the order of equal weights is the same on every machine.
    ordered, order = torch.sort(magnitudes.double().square(), descending=True, stable=True)
    scores = torch.empty_like(ordered)
    # Of a layer of zeros, all sums are zero: nothing is worth keeping.
    scores[order] = (ordered / ordered.cumsum(0)).nan_to_num(nan=0.0)
    return scores
