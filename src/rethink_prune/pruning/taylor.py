"""Taylor importance (Molchanov et al. 2019, *Importance Estimation for Neural Network Pruning*, arXiv:1906.10771).

Removes the filters without which, to first order, the loss changes least. With ``g`` the gradient of a batch's mean
loss, the score of filter ``f`` of a convolution is ::

    score(f) = mean over batches of (sum over the filter's weights w, its bias included, of g w)^2

This is the publication's joint importance of a group of weights: the square of the derivative by a gate, a factor of
one, on the filter's output. Where several filters form a unit (``scope=all``, grouped convolutions, the queries, keys
and values of a head), one gate is for all, so their sums add up before they are squared. A row of a linear layer that
reads tokens is a filter. The publication's other forms sum the squares of single weights, or put the gate after the
batch norm.

The gradients are those of the first `images` training images (of all if there are fewer), in the batches in which they
come; the authors' code for ImageNet averages over 30 batches between two prunings. The publication takes them from the
batches of a training that goes on meanwhile; here the network stays as it is, in evaluation mode. With the statistics
of the batch, a batch norm would cancel any factor on the filters before it, and their sums would all be zero.

Scores of different layers can be compared as they are, and the publication ranks all together (``ranking=global``),
some at a time; the default is the same share of each layer, as for the other pruners.
"""

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.pruning.channel_pruner import ChannelPruner, ChannelTarget, Groups, Scores, rows_of, score_units
from rethink_prune.pruning.gradients import copy_for_gradients, losses_of_batches
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.pruning.samples import FirstImages


class TaylorOptions(ChannelOptions):
    """How many channels go, and how many training images tell which."""

    images: Count = 1000


class Taylor(ChannelPruner[TaylorOptions]):
    """Scores a filter by the first-order change of the loss without it.

    :source: Molchanov et al. 2019
    :goes: channels
    :by: squared sum of weights times gradients: the change of the loss, to first order
    """

    name = "taylor"
    options_type = TaylorOptions
    needs_data = True

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the mean squared change of the loss for every unit, in float64."""
        images = FirstImages(data, self.options.images)
        copy = copy_for_gradients(model, images.device)
        layers = {layer: copy.get_submodule(layer) for group in groups for layer in group.layers}
        sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        batches = 0
        for loss, _ in losses_of_batches(copy, images):
            copy.zero_grad()
            loss.backward()
            changes = {name: _changes_by_gates(layer) for name, layer in layers.items()}
            for group in groups:
                sums[group.name] += score_units(group.units, changes.__getitem__, torch.sum).square()
            batches += 1
        return {name: values / batches for name, values in sums.items()}

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Check the images, score, choose and cut."""
        FirstImages(data, self.options.images, target.input_shape)
        return super().prune(model, target, data=data, generator=generator)


def _changes_by_gates(layer: nn.Module) -> torch.Tensor:
    """Return the derivative of the loss by a factor on each output channel of a layer, in float64."""
    weight = rows_of(layer)
    changes = torch.zeros(len(weight), dtype=torch.float64)
    for parameter in layer.parameters(recurse=False):
        # None where the layer runs in training alone.
        if parameter.grad is not None:
            changes += (parameter.grad * parameter.detach()).double().reshape(len(weight), -1).sum(1).cpu()
    return changes
