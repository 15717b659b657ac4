"""What every pruner is: options, a target known before training or not, and how it prunes.

The common case is a pruner that scores channels: it scores, the analysis groups, surgery cuts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, PrunerOptions
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.selection import (
    Limits,
    check_reach,
    drop_lowest,
    explicit_widths,
    kept_count,
    layers_out_of_reach,
    missed_target,
    widths_for_global_ratio,
    widths_for_ratio,
    widths_for_target,
)
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import ChannelGroup, Channels, analyse
from rethink_prune.surgery.cut import apply, reshape
from rethink_prune.training.hooks import TrainingHooks

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Variants = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class LayerWidth:
    """One prunable layer: how many of its `full` output channels (or weights) are `kept`."""

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
        Operations the analysis does not know, and what it left whole for them; layers that a threshold would have
        emptied.
    """

    layers: tuple[LayerWidth, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """A pruned network with inherited weights, its architecture as data, and the report."""

    model: nn.Module
    architecture: Architecture
    report: PruneReport


class Target(ABC):
    """A pruner's options applied to one network, before its weights are known.

    Parameters
    ----------
    model : torch.nn.Module
        The unpruned network; left as it is.
    example : torch.Tensor
        One batch of its input.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.shapes = on_meta(model)
        self.input_shape = tuple(example.shape[1:])

    @cached_property
    def full_cost(self) -> Cost:
        """Cost of the unpruned network."""
        return count_cost(self.shapes, self.input_shape)

    @property
    @abstractmethod
    def known(self) -> bool:
        """Whether the architecture follows from the options alone, so that scratch arms need no trained network."""

    @abstractmethod
    def architecture(self) -> Architecture:
        """Return an architecture as the options define it; of no use where it is not known."""

    @abstractmethod
    def report(self) -> PruneReport:
        """Return what goes if it is known, and what cannot go."""

    @cached_property
    def cost(self) -> Cost:
        """Cost of the pruned network, where it is known."""
        architecture = self.architecture()
        pruned = reshape(self.shapes, architecture)
        return count_cost(pruned, self.input_shape, masks=architecture.masks)


class Pruner:
    """Base of the pruners. A subclass that scores channels defines :meth:`scores`; others override :meth:`prune`.

    A pruner of your own is a subclass in a module of yours, named as ``pruner.name=path.to.module:Class``.

    Parameters
    ----------
    options : PrunerOptions
        Of the class `options_type`.

    Attributes
    ----------
    options_type : type
        The class of its options: :class:`rethink_prune.config.ChannelOptions`, or a subclass with options of its own.
    variants : mapping
        Published targets: network name -> variant name -> options that say the same (``widths``, ``ratio``, ``skip``).
    selecting : {"norm", "conv"}, optional
        Which modules select channels from streams that stay whole; see :func:`rethink_prune.surgery.channels.analyse`.
    trains_sparse : bool
        Whether it trains the network its own way; then :meth:`sparse` says how.
    needs_data : bool
        Whether :meth:`prune` reads training images.
    """

    options_type: ClassVar[type[PrunerOptions]] = ChannelOptions
    variants: ClassVar[Variants] = {}
    selecting: ClassVar[Literal["norm", "conv"] | None] = None
    trains_sparse: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def __init__(self, options: PrunerOptions) -> None:
        self.options: Any = options

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> Target:
        """Apply the options to a network.

        Parameters
        ----------
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
        return ChannelTarget(self, model, example, network)

    def check_images(self, target: Target, images: int) -> None:
        """Raise `UserError` if so many training images are too few for this pruner."""

    def sparse(self, target: Any) -> TrainingHooks:
        """Return how the network is trained in the stage ``sparse``; `target` is what :meth:`target` returned."""
        raise NotImplementedError

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
            Training batches; None where :func:`~rethink_prune.prune` was given none.
        generator : torch.Generator
            For pruners that draw.
        """
        raise NotImplementedError

    def prune(self, model: nn.Module, target: Any, *, data: Batches | None, generator: torch.Generator) -> PruneResult:
        """Score, choose and cut; `model` itself is untouched.

        Parameters
        ----------
        model : torch.nn.Module
            The trained network (of the stage ``sparse`` if there is one), on the CPU.
        target : ChannelTarget
            What :meth:`target` returned.
        data, generator
            As for :meth:`scores`.
        """
        scores = self.scores(model, target.groups, data=data, generator=generator)
        return target.cut(model, target.choose(scores))

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether this pruner prunes the group; by default, channels of convolutions and selections of them."""
        return group.kind != "linear"

    def kept_count(self, size: int, ratio: float) -> int:
        """Return how many of `size` channels remain when a share of `ratio` goes."""
        return kept_count(size, ratio)


@dataclass(frozen=True)
class Choice:
    """The units to drop, per group, and what should be said about it."""

    drop: Mapping[str, Sequence[int]]
    warnings: tuple[str, ...] = ()


class ChannelTarget(Target):
    """Which groups of channels may be pruned, and, where the options alone decide it, how wide each remains.

    Parameters
    ----------
    pruner : Pruner
        With its options, a `ChannelOptions`.
    model, example
        See `Target`.
    network : str, optional
        The network's name, to look up variants.

    Attributes
    ----------
    channels : Channels
        The analysis.
    groups : tuple of ChannelGroup
        What this pruner may touch.
    widths : mapping of str to int, or None
        Units to keep per group; None where they follow from scores.

    Raises
    ------
    UserError
        If the options do not fit the network, e.g. a variant it does not have.
    """

    def __init__(self, pruner: Pruner, model: nn.Module, example: torch.Tensor, network: str | None = None) -> None:
        super().__init__(model, example)
        options = pruner.options
        self._options: ChannelOptions = options
        self._pruner = pruner
        self._network = network or type(model).__name__
        self.channels: Channels = analyse(model, example, selecting=pruner.selecting)
        self.groups = self._find_groups(model)
        if not self.groups:
            frozen = "; ".join(f"{layer}: {reason}" for layer, reason in self.channels.frozen.items())
            raise UserError(
                f"pruner.name={options.name}: finds no channels it can prune in {self._network} "
                f"with scope={options.scope} ({frozen or 'no convolutions'})"
            )
        self._sizes = {group.name: group.size for group in self.groups}
        self._notes: list[str] = []
        self.widths: Mapping[str, int] | None = self._known_widths() if options.widths_follow else None
        # Where scores decide, the largest ratio shows what skip and the limits leave to remove.
        narrowest = self.widths or self._widths_for_ratio(1 - 1e-6, options.skip, self._limits)
        self._check_removal(narrowest)
        if options.target_macs is not None or options.target_params is not None:
            quantity, target = self._cost_target()
            check_reach(target, quantity, self._cost_at(narrowest), self.full_cost)

    def _find_groups(self, model: nn.Module) -> tuple[ChannelGroup, ...]:
        groups = self.channels.groups(self._options.scope)
        return tuple(group for group in groups if self._pruner.may_touch(group))

    @property
    def _left_whole(self) -> dict[str, str]:
        """The layers that cannot go, and those in scope that this pruner does not touch, with the reason."""
        touched = {group.name for group in self.groups}
        others = (group for group in self.channels.groups(self._options.scope) if group.name not in touched)
        name = self._options.name
        return {**self.channels.frozen, **{group.name: f"not for {name}, which leaves it alone" for group in others}}

    def _apply(self, model: nn.Module, drop: Mapping[str, Sequence[int]]) -> tuple[nn.Module, Architecture]:
        return apply(model, self.channels.plan(drop))

    @property
    def known(self) -> bool:
        """Whether the widths follow from the options alone."""
        return self.widths is not None

    def architecture(self) -> Architecture:
        """Return an architecture with these widths, the channels of highest index gone."""
        return self._cut_last(self.widths or self._sizes)[1]

    def choose(self, scores: Mapping[str, torch.Tensor]) -> Choice:
        """Return the units to drop, by score."""
        if not isinstance(scores, Mapping) or set(scores) != set(self._sizes):
            names = ", ".join(sorted(self._sizes))
            raise UserError(f"pruner: scores() must return a mapping with just these keys: {names}")
        for name, size in self._sizes.items():
            values = scores[name]
            if not (isinstance(values, torch.Tensor) and values.shape == (size,) and torch.isfinite(values).all()):
                raise UserError(f"pruner: scores of {name} must be a tensor of {size} finite numbers")
        if self.widths is not None:
            return Choice(drop_lowest(scores, self.widths))
        widths, emptied = self._ranked_widths(scores)
        self._check_removal(widths)
        warnings = [f"{name}: the threshold would have emptied it; its best {widths[name]} stay" for name in emptied]
        if self._options.ratio is None:
            quantity, target = self._cost_target()
            warnings += missed_target(target, quantity, self._cost_at(widths), self.full_cost)
        return Choice(drop_lowest(scores, widths), tuple(warnings))

    def cut(self, model: nn.Module, choice: Choice) -> PruneResult:
        """Return a copy of `model` without the units that were chosen."""
        pruned, architecture = self._apply(model, choice.drop)
        layers = tuple(
            LayerWidth(name, size - len(choice.drop.get(name, ())), size) for name, size in self._sizes.items()
        )
        warnings = (*self.channels.warnings, *self._notes, *choice.warnings)
        return PruneResult(pruned, architecture, PruneReport(layers, self._left_whole, warnings))

    def report(self) -> PruneReport:
        """Return what goes, if it is known, and what cannot go."""
        widths = self.widths or self._sizes
        layers = tuple(LayerWidth(name, widths[name], size) for name, size in self._sizes.items())
        return PruneReport(layers, self._left_whole, (*self.channels.warnings, *self._notes))

    def _check_removal(self, widths: Mapping[str, int]) -> None:
        if all(widths[name] == size for name, size in self._sizes.items()):
            options = self._options
            raise UserError(
                f"pruner.{options.target}={getattr(options, options.target)}: removes nothing from "
                f"{self._network} (with pruner.skip, min_channels and round_to as they are)"
            )

    def _known_widths(self) -> dict[str, int]:
        options = self._options
        if options.variant is not None:
            variant = find_variant(self._pruner, self._network)
            if "widths" in variant:
                return explicit_widths(variant["widths"], self._sizes)
            return self._widths_for_ratio(variant["ratio"], variant.get("skip", ()), Limits())
        if options.widths is not None:
            return explicit_widths(options.widths, self._sizes)
        if options.ratio is not None:
            self._notes += [
                f"{name}: pruner.ratio would leave none of its {self._sizes[name]} channels; one stays"
                for name in layers_out_of_reach(options.ratio, self._sizes, skip=options.skip)
            ]
            return self._widths_for_ratio(options.ratio, options.skip, self._limits)
        return self._widths_for_cost(lambda ratio: self._widths_for_ratio(ratio, options.skip, self._limits))

    def _ranked_widths(self, scores: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], list[str]]:
        """Return the widths that one threshold for all channels leaves, and the groups it would empty."""
        options = self._options
        values = torch.cat(list(scores.values()))
        if bool((values == values[0]).all()):
            raise UserError(
                f"pruner.name={options.name}: all {len(values)} channels score {values[0]:g}, so none is worth less "
                "than another; give it a trained network, or pruner.ranking=layer"
            )
        if options.ratio is not None:
            assert isinstance(options.ratio, float)
            return widths_for_global_ratio(options.ratio, scores, skip=options.skip, limits=self._limits)

        def widths_at(ratio: float) -> dict[str, int]:
            return widths_for_global_ratio(ratio, scores, skip=options.skip, limits=self._limits)[0]

        # The network is trained by now: what comes nearest is better than nothing.
        widths = self._widths_for_cost(widths_at, strict=False)
        self._check_removal(widths)
        threshold = max(scores[name][units].max() for name, units in drop_lowest(scores, widths).items() if units)
        return widths, [name for name in widths if widths[name] < self._sizes[name] and scores[name].max() <= threshold]

    def _widths_for_ratio(self, ratio: Any, skip: Sequence[str], limits: Limits) -> dict[str, int]:
        return widths_for_ratio(ratio, self._sizes, skip=skip, limits=limits, kept=self._pruner.kept_count)

    def _cost_target(self) -> tuple[str, float]:
        quantity = "macs" if self._options.target_macs is not None else "params"
        return quantity, getattr(self._options, f"target_{quantity}")

    def _widths_for_cost(self, widths_at: Any, *, strict: bool = True) -> dict[str, int]:
        quantity, target = self._cost_target()
        return widths_for_target(
            target,
            quantity,
            widths_at,
            self._cost_at,
            self.full_cost,
            strict=strict,
        )

    def _cost_at(self, widths: Mapping[str, int]) -> Cost:
        pruned, architecture = self._cut_last(widths)
        return count_cost(pruned, self.input_shape, masks=architecture.masks)

    def _cut_last(self, widths: Mapping[str, int]) -> tuple[nn.Module, Architecture]:
        return self._apply(self.shapes, {name: range(widths[name], size) for name, size in self._sizes.items()})

    @property
    def _limits(self) -> Limits:
        return Limits(self._options.min_channels, self._options.round_to)


def find_variant(pruner: Pruner, network: str) -> Mapping[str, Any]:
    """Return what a published target means for a network, by the pruner's option ``variant``.

    Raises
    ------
    UserError
        If the pruner has no such variant of the network; names those it has.
    """
    options = pruner.options
    variant = pruner.variants.get(network, {}).get(options.variant)
    if variant is None:
        if not pruner.variants:
            raise UserError(f"pruner.variant={options.variant}: {options.name} has no published targets")
        known = "; ".join(f"{name}: {', '.join(variants)}" for name, variants in pruner.variants.items())
        raise UserError(
            f"pruner.variant={options.variant}: {options.name} has no such variant of {network}; there are {known}"
        )
    return variant
