"""What every pruner that scores channels shares: it scores, the analysis groups, surgery cuts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from rethink_prune.config import PrunerOptions
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning import surgery
from rethink_prune.pruning.channels import ChannelGroup, Channels, analyse
from rethink_prune.pruning.selection import (
    Limits,
    drop_lowest,
    explicit_widths,
    widths_for_ratio,
    widths_for_target,
)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LayerWidth:
    """One prunable layer: how many of its `full` output channels are `kept`."""

    layer: str
    kept: int
    full: int


@dataclass(frozen=True)
class PruneReport:
    """What went and what could not go.

    Attributes
    ----------
    layers : tuple of LayerWidth
        Every layer the pruner may touch, in network order.
    frozen : mapping of str to str
        Layers that are left whole, with the reason.
    warnings : tuple of str
        Operations the analysis does not know, and what it left whole for them.
    """

    layers: tuple[LayerWidth, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """A pruned network with inherited weights, its architecture as data, and the report."""

    model: nn.Module
    architecture: surgery.Architecture
    report: PruneReport


class Pruner(ABC):
    """Base of the pruners; a subclass says which groups it may touch and scores their units.

    A pruner of your own is a subclass in a module of yours, named as ``pruner.name=path.to.module:Class``. It sets
    `options` (a subclass of :class:`rethink_prune.config.PrunerOptions`) and defines :meth:`scores`.

    Attributes
    ----------
    options : type
        The class of its options.
    variants : mapping
        Published targets: network name -> variant name -> options that say the same (``widths``, ``ratio``, ``skip``).
    predefined : bool
        Whether the widths follow from the options alone, so that scratch arms need no trained network.
    """

    options: ClassVar[type[PrunerOptions]] = PrunerOptions
    variants: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    predefined: ClassVar[bool] = True

    @abstractmethod
    def scores(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        data: Batches | None,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Return one score per unit for each group, by the group's name; the lowest go first.

        Parameters
        ----------
        model : torch.nn.Module
            The network, on the CPU; not to be changed.
        groups : sequence of ChannelGroup
            What may be pruned.
        data : iterable of (images, labels), optional
            Training batches, for pruners that need them; None where :func:`~rethink_prune.prune` was given none.
        generator : torch.Generator
            For pruners that draw.
        """

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether this pruner prunes the group; by default, groups of convolutions."""
        return group.kind == "conv"


class Target:
    """A pruner's options applied to one network: which groups, and how wide each remains.

    Parameters
    ----------
    pruner : Pruner
    options : PrunerOptions
    model : torch.nn.Module
        Left as it is.
    example : torch.Tensor
        One batch of the network's input.
    network : str, optional
        The network's name, to look up variants.

    Raises
    ------
    UserError
        If the options do not fit the network, e.g. a variant it does not have.
    """

    def __init__(
        self,
        pruner: Pruner,
        options: PrunerOptions,
        model: nn.Module,
        example: torch.Tensor,
        network: str | None = None,
    ) -> None:
        self.channels: Channels = analyse(model, example)
        self.groups = tuple(group for group in self.channels.groups(options.scope) if pruner.may_touch(group))
        if not self.groups:
            frozen = "; ".join(f"{layer}: {reason}" for layer, reason in self.channels.frozen.items())
            raise UserError(
                f"pruner.name={options.name}: finds no channels it can prune in {network or type(model).__name__} "
                f"with scope={options.scope} ({frozen or 'no convolutions'})"
            )
        self._shapes = on_meta(model)
        self._input_shape = tuple(example.shape[1:])
        self.widths: Mapping[str, int] = self._resolve(pruner, options, network)
        if all(self.widths[group.name] == group.size for group in self.groups):
            raise UserError(
                f"pruner.{options.target}={getattr(options, options.target)}: removes nothing from "
                f"{network or type(model).__name__} (with pruner.skip, min_channels and round_to as they are)"
            )

    @cached_property
    def full_cost(self) -> Cost:
        """Cost of the unpruned network."""
        return count_cost(self._shapes, self._input_shape)

    @cached_property
    def cost(self) -> Cost:
        """Cost of the pruned network."""
        return self._cost_of(self.widths)

    def architecture(self) -> surgery.Architecture:
        """Return an architecture with these widths, the channels of highest index gone."""
        return self._cut(self.widths)[1]

    def drop(self, scores: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
        """Return the units to drop, per group, by score."""
        names = {group.name for group in self.groups}
        if not isinstance(scores, Mapping) or set(scores) != names:
            raise UserError(f"pruner: scores() must return a mapping with just these keys: {', '.join(sorted(names))}")
        for group in self.groups:
            values = scores[group.name]
            if not (
                isinstance(values, torch.Tensor) and values.shape == (group.size,) and torch.isfinite(values).all()
            ):
                raise UserError(f"pruner: scores of {group.name} must be a tensor of {group.size} finite numbers")
        return drop_lowest(scores, self.widths)

    def report(self) -> PruneReport:
        """Return what goes, and what could not go."""
        layers = tuple(LayerWidth(group.name, self.widths[group.name], group.size) for group in self.groups)
        return PruneReport(layers, dict(self.channels.frozen), self.channels.warnings)

    def _resolve(self, pruner: Pruner, options: PrunerOptions, network: str | None) -> dict[str, int]:
        sizes = {group.name: group.size for group in self.groups}
        limits = Limits(options.min_channels, options.round_to)
        if options.variant is not None:
            variant = _find_variant(pruner, options, network)
            if "widths" in variant:
                return explicit_widths(variant["widths"], sizes)
            return widths_for_ratio(variant["ratio"], sizes, skip=variant.get("skip", ()))
        if options.widths is not None:
            return explicit_widths(options.widths, sizes)
        if options.ratio is not None:
            return widths_for_ratio(options.ratio, sizes, skip=options.skip, limits=limits)
        quantity = "macs" if options.target_macs is not None else "params"
        return widths_for_target(
            getattr(options, f"target_{quantity}"),
            quantity,
            lambda ratio: widths_for_ratio(ratio, sizes, skip=options.skip, limits=limits),
            self._cost_of,
            self.full_cost,
        )

    def _cost_of(self, widths: Mapping[str, int]) -> Cost:
        return count_cost(self._cut(widths)[0], self._input_shape)

    def _cut(self, widths: Mapping[str, int]) -> tuple[nn.Module, surgery.Architecture]:
        drop = {group.name: range(widths[group.name], group.size) for group in self.groups}
        return surgery.apply(self._shapes, self.channels.plan(drop))


def run_pruner(
    pruner: Pruner,
    target: Target,
    model: nn.Module,
    *,
    data: Batches | None,
    generator: torch.Generator,
) -> PruneResult:
    """Score, choose and cut; `model` itself is untouched."""
    scores = pruner.scores(model, target.groups, data=data, generator=generator)
    pruned, architecture = surgery.apply(model, target.channels.plan(target.drop(scores)))
    return PruneResult(pruned, architecture, target.report())


def _find_variant(pruner: Pruner, options: PrunerOptions, network: str | None) -> Mapping[str, Any]:
    variant = pruner.variants.get(network or "", {}).get(options.variant or "")
    if variant is None:
        known = "; ".join(f"{name}: {', '.join(variants)}" for name, variants in pruner.variants.items())
        raise UserError(
            f"pruner.variant={options.variant}: {options.name} has no such variant of {network or 'this network'}; "
            f"there are {known or 'none'}; or give pruner.ratio"
        )
    return variant
