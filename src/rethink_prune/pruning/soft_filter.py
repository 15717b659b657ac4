"""Soft filter pruning (He et al. 2018, *Soft Filter Pruning for Accelerating Deep CNNs*, arXiv:1808.06866).

The stage ``sparse`` trains the network from scratch; after every epoch, the filters with the smallest L2 norm of each
layer are set to zero, ::

    score(f) = sqrt(sum over c, i, j of W[f, c, i, j]^2)

and go on training: they may grow again until the next epoch ends. After the last one, zeroed filters are removed, and
with them their batch norm's gamma and beta (which the training leaves alone).

The authors' script zeroes once before the first epoch as well. There the batch norms' shifts are still zero, and a ReLU
passes no gradient at zero: a filter that is zeroed then can never grow again, and the pruner would train a subnetwork
that the initial weights chose. A filter that is zeroed later grows again where its shift has become positive. How many
did is in ``metrics.csv`` as ``regrown``: the percentage of the filters zeroed after the epoch before that are not zero.

``scope=inner`` zeroes and removes the channels that no addition ties. ``scope=all`` zeroes filters of *every*
convolution, as the authors do, apart from those that have to stay whole (the network's output); those whose channels
run into a residual stream cannot be cut out one layer at a time, so they stay as filter masks (with gamma and beta),
and only weights that are not masked count as parameters and MACs.

Of ``N`` filters, ``int(N * ratio)`` go: the published rule, which rounds the other way than the other pruners'. How
many go follows from the options, which ones from the trained network; scratch arms alone need no training. With
``ranking=global``, all filters are ranked together, and both follow from the network.

Liu et al. (2019) train Scratch-B for 200 or 400 times the ratio of MACs, which they count without the layers that read
a zeroed filter; ``scope=inner`` with ``budget.base_epochs=400`` comes within an epoch of their lengths, ``scope=all``
has fewer MACs and so more epochs.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.config import ChannelOptions
from rethink_prune.cost import on_meta
from rethink_prune.pruning.channel_pruner import ChannelPruner, ChannelTarget, Groups, Scores
from rethink_prune.pruning.l1 import sums_over_filters
from rethink_prune.pruning.pruner import Batches
from rethink_prune.surgery.channels import ChannelGroup, Channels
from rethink_prune.surgery.graph import module_calls, trace
from rethink_prune.training.hooks import TrainingHooks


class SoftFilter(ChannelPruner[ChannelOptions]):
    """Zeroes filters while it trains, and removes those that are zero at the end.

    :source: He et al. 2018
    :goes: channels; with `scope=all` filters of every convolution
    :by: L2 norm
    :trains: zeroes filters after each epoch, lets them grow again
    """

    name = "soft_filter"
    position = 7
    trains_sparse = True
    in_rounds = False
    meant_for = "filters of convolutions"
    no_rounds = "it removes what its own training of the unpruned network has zeroed after every epoch"

    def find_groups(self, model: nn.Module, channels: Channels) -> tuple[tuple[ChannelGroup, ...], Collection[str]]:
        """Return the channels to remove; with ``scope=all`` also the convolutions whose filters are masked."""
        removed = tuple(group for group in channels.groups("inner") if self.may_touch(group))
        if self.options.scope == "inner":
            return removed, ()
        # Cut already, or not to be touched, such as the network's output.
        whole = {layer for group in removed for layer in group.layers} | set(channels.frozen)
        masked = [group for group in _filter_groups(model) if group.name not in whole]
        order = [name for name, _ in model.named_modules()]
        groups = sorted((*removed, *masked), key=lambda group: order.index(group.layers[0]))
        return tuple(groups), {group.name for group in masked}

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether these are filters of a convolution."""
        return group.kind == "conv"

    def kept_count(self, size: int, ratio: float) -> int:
        """Return how many filters remain when ``int(size * ratio)`` go: at least one."""
        return max(1, size - int(size * ratio + 1e-9))

    def sparse(self, target: ChannelTarget) -> TrainingHooks:
        """Return the zeroing after each epoch."""
        return ZeroFilters(target, self.options)

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return the L2 norm of every unit's filters in float64; comparable where all are ranked together."""
        return filter_norms(model, groups, self.options)


class ZeroFilters(TrainingHooks):
    """Sets the smallest filters of each layer to zero after each epoch.

    A buffer of each layer, ``zeroed``, says which of its filters were; it is removed at the end.

    Parameters
    ----------
    target : ChannelTarget
        Which layers, and how many filters go.
    options : ChannelOptions
        What the target was made of.
    """

    def __init__(self, target: ChannelTarget, options: ChannelOptions) -> None:
        self._target = target
        self._options = options

    @property
    def key(self) -> Mapping[str, Any]:
        """All options: what is removed in the end is what is zeroed all along. Earlier versions zeroed once more."""
        return {**self._options.key(), "zeroes": "after epochs"}

    def prepare(self, model: nn.Module) -> None:
        """Give each layer the buffer ``zeroed``."""
        for layer in self._layers():
            module = model.get_submodule(layer)
            weight = module.get_parameter("weight")
            zeroed = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
            module.register_buffer("zeroed", zeroed, persistent=False)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module) -> dict[str, float]:
        """Zero the filters that are smallest now; none of a network that has diverged, whose loss will tell."""
        norms = filter_norms(model, self._target.groups, self._options)
        # `choose` would refuse such norms with an error about the pruner; the loss says better what happened.
        if not all(torch.isfinite(values).all() for values in norms.values()):
            return {}
        regrown = self._count_regrown(model)
        drop = self._target.choose(norms).drop
        for layer in self._layers():
            model.get_submodule(layer).get_buffer("zeroed").fill_(False)
        for group in self._target.groups:
            for index in drop[group.name]:
                # The filter and its bias; the batch norm's gamma and beta go on training.
                for layer, positions in group.units[index].items():
                    module = model.get_submodule(layer)
                    module.get_buffer("zeroed")[list(positions)] = True
                    for parameter in module.parameters(recurse=False):
                        parameter[list(positions)] = 0.0
        return regrown

    def finish(self, model: nn.Module) -> None:
        """Remove the buffers."""
        for layer in self._layers():
            del model.get_submodule(layer).zeroed

    def _layers(self) -> dict[str, None]:
        return dict.fromkeys(layer for group in self._target.groups for layer in group.layers)

    def _count_regrown(self, model: nn.Module) -> dict[str, float]:
        """Return the percentage of zeroed filters that are not zero any more; nothing where none was zeroed."""
        modules = [model.get_submodule(layer) for layer in self._layers()]
        zeroed = torch.cat([module.get_buffer("zeroed").cpu() for module in modules])
        grown = torch.cat([module.get_parameter("weight").flatten(1).any(1).cpu() for module in modules])
        return {"regrown": 100.0 * float(grown[zeroed].float().mean())} if zeroed.any() else {}


def filter_norms(model: nn.Module, groups: Groups, options: ChannelOptions) -> Scores:
    """Return, for every unit of each group, the sum of its filters' L2 norms; as `L1` does where all are ranked."""
    together = options.ranking == "global"
    return sums_over_filters(model, groups, lambda filters: filters.square().sum(1).sqrt(), comparable=together)


def _filter_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return every convolution as a group of its own, with the batch norms that read it and nothing else."""
    network = on_meta(model)
    modules = dict(network.named_modules())
    parameters = dict(network.named_parameters())  # one that layers share is there once
    calls = module_calls(trace(network))
    groups: list[ChannelGroup] = []
    for name, nodes in calls.items():
        layer = modules[name]
        if isinstance(layer, nn.Conv2d) and f"{name}.weight" in parameters:
            readers = {user for node in nodes for user in node.users}
            # A norm that reads another convolution too keeps its scale for that one.
            norms = [norm for norm in calls if isinstance(modules[norm], _BatchNorm) and readers >= {*calls[norm]}]
            positions = tuple((index,) for index in range(layer.out_channels))
            units = tuple({name: position} for position in positions)
            groups.append(ChannelGroup(name, "conv", (name,), units, dict.fromkeys(norms, positions)))
    return groups
