"""Magnitude pruning of single weights (Han et al. 2015, *Learning both Weights and Connections*, arXiv:1506.02626).

Removes the weights of smallest absolute value of each convolution, the first one and projections included, and keeps
the network's shape. Linear layers that read tokens take part; with ``linear=true`` all do. `distribution` says how many
weights each layer keeps:

``global``
    All weights are ranked together: of ``n`` values ``|w|`` in ascending order, that at index ``int(n * ratio)`` is the
    threshold, and what is not above it goes.
``uniform``
    The same share goes from every layer, or a share for each.
``erk``
    Erdos-Renyi-Kernel (Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134): the share that a
    layer keeps is proportional to the sum of its weight's dimensions divided by their product. Layers that would keep
    more than all are left whole, and the others share the rest. Of a network that was pruned before, the shares are
    those of all weights, and no layer keeps more than what remains of it.
``lamp``
    Layer-adaptive magnitudes are ranked together; see `lamp`.

Han et al. set a threshold for each layer by hand; the paper ranks all weights together.

See `weight_pruner` for masks, and for networks that were pruned before: there, as in the paper's lottery tickets,
``n`` counts the weights that remain.
"""

from typing import Any, Literal

import torch
from torch import nn

from rethink_prune.config import Ratio
from rethink_prune.pruning.lamp import lamp_scores
from rethink_prune.pruning.pruner import Batches
from rethink_prune.pruning.weight_pruner import Distribution, WeightOptions, WeightPruner, WeightScores, WeightTarget


class MagnitudeOptions(WeightOptions):
    """How many weights go, of which layers, and how those that stay are distributed over the layers."""

    distribution: Literal["global", "uniform", "erk", "lamp"] = "global"
    ratio: Ratio = None  # type: ignore[assignment]  # with distribution=uniform also one for each layer

    def key(self) -> dict[str, Any]:
        """Return the options as stage keys have them: earlier versions called two of the distributions rankings."""
        earlier = {"global": "global", "uniform": "layer"}
        key = super().key()
        key.pop("distribution", None)
        return {**key, "ranking": earlier.get(self.distribution, self.distribution)}


class Magnitude(WeightPruner[MagnitudeOptions]):
    """Masks the weights of smallest magnitude.

    :source: Han et al. 2015
    :goes: single weights
    :by: absolute value, ranked over all layers or in each (`distribution`); masks
    """

    name = "magnitude"
    position = 6
    in_rounds = True
    options_type = MagnitudeOptions

    @property
    def distribution(self) -> Distribution:
        """How the weights that stay are distributed over the layers; layer-adaptive magnitudes are ranked together."""
        chosen = self.options.distribution
        return "global" if chosen == "lamp" else chosen

    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return the absolute values, or what `lamp` makes of them."""
        values = {name: weight.detach().abs().flatten() for name, weight in target.weights(model).items()}
        adaptive = self.options.distribution == "lamp"
        return {name: lamp_scores(magnitudes) for name, magnitudes in values.items()} if adaptive else values
