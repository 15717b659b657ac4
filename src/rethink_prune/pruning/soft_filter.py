"""Soft filter pruning (He et al. 2018, *Soft Filter Pruning for Accelerating Deep CNNs*, arXiv:1808.06866).

The stage ``sparse`` trains the network from scratch; once before the first epoch and after every epoch, the filters
with the smallest L2 norm of each layer are set to zero, ::

    score(f) = sqrt(sum over c, i, j of W[f, c, i, j]^2)

and go on training: they may grow again until the next epoch ends. After the last one, zeroed filters are removed, and
with them their batch norm's gamma and beta (which the training leaves alone).

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

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.config import ChannelOptions
from rethink_prune.cost import on_meta
from rethink_prune.pruning.l1 import sums_over_filters
from rethink_prune.pruning.pruner import Batches, ChannelTarget, Pruner
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import ChannelGroup
from rethink_prune.surgery.cut import apply
from rethink_prune.surgery.graph import trace
from rethink_prune.surgery.masks import apply_masks
from rethink_prune.training.hooks import TrainingHooks


class SoftFilterTarget(ChannelTarget):
    """Groups of channels to remove; with ``scope=all`` also convolutions whose filters are masked.

    Attributes
    ----------
    masked : tuple of str
        Names of the groups that stand for one convolution each, whose filters are masked instead of removed.
    """

    masked: tuple[str, ...] = ()

    def _find_groups(self, model: nn.Module) -> tuple[ChannelGroup, ...]:
        inner = tuple(group for group in self.channels.groups("inner") if group.kind == "conv")
        if self._options.scope == "inner":
            return inner
        removed = {layer for group in inner for layer in group.layers}
        whole = removed | set(self.channels.frozen)
        filters = [group for group in _filter_groups(self.shapes) if group.name not in whole]
        self.masked = tuple(group.name for group in filters)
        order = [name for name, _ in model.named_modules()]
        return tuple(sorted((*inner, *filters), key=lambda group: order.index(group.layers[0])))

    def _apply(self, model: nn.Module, drop: Mapping[str, Sequence[int]]) -> tuple[nn.Module, Architecture]:
        cut = {name: units for name, units in drop.items() if name not in self.masked}
        pruned, architecture = apply(model, self.channels.plan(cut))
        masks: dict[str, torch.Tensor] = {}
        for group in self.groups:
            if group.name in self.masked and drop.get(group.name):
                for module in (*group.layers, *group.norms):
                    for kind, parameter in pruned.get_submodule(module).named_parameters(recurse=False):
                        mask = torch.ones(parameter.shape, dtype=torch.bool)
                        mask[list(drop[group.name])] = False
                        masks[f"{module}.{kind}"] = mask
        apply_masks(pruned, masks)
        return pruned, Architecture(architecture.modules, architecture.edits, architecture.selections, masks=masks)


class SoftFilter(Pruner):
    """Zeroes filters while it trains, and removes those that are zero at the end."""

    trains_sparse: ClassVar[bool] = True

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> SoftFilterTarget:
        """Apply the options to a network."""
        return SoftFilterTarget(self, model, example, network)

    def kept_count(self, size: int, ratio: float) -> int:
        """Return how many filters remain when ``int(size * ratio)`` go: at least one."""
        return max(1, size - int(size * ratio + 1e-9))

    def sparse(self, target: Any) -> TrainingHooks:
        """Return the zeroing after each epoch."""
        return ZeroFilters(target, self.options)

    def scores(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        data: Batches | None,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Return the L2 norm of every unit's filters in float64; `data` and `generator` are not used."""
        return filter_norms(model, groups)


class ZeroFilters(TrainingHooks):
    """Sets the smallest filters of each layer to zero, before the first epoch and after each.

    Parameters
    ----------
    target : SoftFilterTarget
        Which layers, and how many filters go.
    options : ChannelOptions
        What the target was made of.
    """

    def __init__(self, target: SoftFilterTarget, options: ChannelOptions) -> None:
        self._target = target
        self._options = options

    @property
    def key(self) -> Mapping[str, Any]:
        """All options: what is removed in the end is what is zeroed all along."""
        return self._options.model_dump(mode="json")

    def prepare(self, model: nn.Module) -> None:
        """Zero filters once before training."""
        self.after_epoch(model)

    @torch.no_grad()
    def after_epoch(self, model: nn.Module) -> None:
        """Zero the filters that are smallest now; none of a network that has diverged, whose loss will tell."""
        norms = filter_norms(model, self._target.groups)
        if not all(torch.isfinite(values).all() for values in norms.values()):
            return
        drop = self._target.choose(norms).drop
        for group in self._target.groups:
            for index in drop[group.name]:
                for layer, positions in group.units[index].items():
                    for parameter in model.get_submodule(layer).parameters(recurse=False):
                        parameter[list(positions)] = 0.0


def filter_norms(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
    """Return, for every unit of each group, the sum of its filters' L2 norms."""
    return sums_over_filters(model, groups, lambda filters: filters.square().sum(1).sqrt())


def _filter_groups(shapes: nn.Module) -> list[ChannelGroup]:
    """Return every convolution as a group of its own, with the batch norms that read it and nothing else."""
    network = on_meta(shapes)
    modules = dict(network.named_modules())
    parameters = dict(network.named_parameters())  # one that layers share is there once
    calls: dict[str, list[fx.Node]] = {}
    for node in trace(network).nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    groups: list[ChannelGroup] = []
    for name, nodes in calls.items():
        layer = modules[name]
        if isinstance(layer, nn.Conv2d) and f"{name}.weight" in parameters:
            units = tuple({name: (index,)} for index in range(layer.out_channels))
            positions = tuple((index,) for index in range(layer.out_channels))
            readers = {user for node in nodes for user in node.users}
            norms = [
                norm
                for norm, reading in calls.items()
                if isinstance(modules[norm], _BatchNorm) and readers >= {*reading}
            ]
            groups.append(ChannelGroup(name, "conv", (name,), units, dict.fromkeys(norms, positions)))
    return groups
