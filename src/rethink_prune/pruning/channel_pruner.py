"""Pruners of channels: the target says which groups may go and how wide each remains, the pruner which channels.

A :class:`ChannelPruner` scores them; the analysis groups, surgery cuts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, PrunerOptions
from rethink_prune.cost import Cost, count_cost
from rethink_prune.errors import UserError
from rethink_prune.pruning import selection
from rethink_prune.pruning.pruner import (
    FOR_TOKENS,
    Batches,
    LayerWidth,
    Pruner,
    PruneReport,
    PruneResult,
    Target,
    check_scores,
)
from rethink_prune.pruning.selection import PerLayer, kept_count
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.channels import ChannelGroup, Channels, Positions, analyse
from rethink_prune.surgery.cut import apply

Groups = Sequence[ChannelGroup]
Scores = Mapping[str, torch.Tensor]
# The kinds of groups that only transformers and their like have.
OF_TOKENS = ("tokens", "heads")


@dataclass(frozen=True)
class Choice:
    """The units to drop, per group, and what should be said about it."""

    drop: Mapping[str, Sequence[int]]
    warnings: tuple[str, ...] = ()


@final
class ChannelTarget(Target):
    """Which groups of channels may be pruned, and, where the options alone decide it, how wide each remains.

    Parameters
    ----------
    pruner : Channelwise
        With its options.
    model, example
        See `Target`.
    network : str
        The network's name, to look up variants.

    Attributes
    ----------
    channels : Channels
        The analysis of the network.
    groups : tuple of ChannelGroup
        What the pruner may touch, in network order.
    network : str
        Its name.
    masked : set of str
        Names of the groups whose units are masked instead of removed; their units have one position in one layer.
    widths : mapping of str to int, or None
        Units to keep per group; None where they follow from scores.
    limits : Limits
        Bounds on the widths.
    wanted : WantedCost or None
        The cost that the options ask for.

    Raises
    ------
    UserError
        If the options do not fit the network, e.g. a variant it does not have.
    """

    def __init__(self, pruner: Channelwise[Any], model: nn.Module, example: torch.Tensor, network: str) -> None:
        super().__init__(model, example)
        self._pruner, self.network = pruner, network
        self._options: ChannelOptions = pruner.options
        options = self._options
        self.channels = channels = analyse(
            model,
            example,
            selecting=pruner.selecting,
            attention=options.attention,
            approximate=options.approximate,
        )
        self.groups, self.masked = pruner.find_groups(model, channels)
        if not self.groups:
            if pruner.meant_for and (hint := hint_at_tokens(channels, options.scope)):
                raise UserError(
                    f"pruner.name={options.name}: prunes {pruner.meant_for}, and {self.network} has none that can go, "
                    f"so it has no meaning there; {hint}"
                )
            frozen = "; ".join(f"{layer}: {reason}" for layer, reason in channels.frozen.items())
            raise UserError(
                f"pruner.name={options.name}: finds no channels it can prune in {self.network} "
                f"with scope={options.scope} ({frozen or 'no convolutions'})"
            )
        self._sizes = {group.name: group.size for group in self.groups}
        self.limits = selection.Limits(options.min_channels, options.round_to, options.min_share)
        self.wanted = selection.wanted_cost(options, self)
        self._warnings = channels.warnings
        if options.decides_widths and options.ratio is not None:
            self._warnings += tuple(
                f"{name}: pruner.ratio would leave none of its {self._sizes[name]} channels; one stays"
                for name in selection.layers_out_of_reach(options.ratio, self._sizes, skip=options.skip)
            )
        self.widths = pruner.find_widths(self) if options.decides_widths else None
        # Where scores decide, the largest ratio shows what skip and the limits leave to remove.
        self._narrowest = self.widths or self.widths_for_ratio(1 - 1e-6)
        self._check_removal(self._narrowest)
        if self.wanted is not None:
            self.wanted.check_reach(self.cost_at(self._narrowest))

    @property
    def known(self) -> bool:
        """Whether the widths follow from the options alone."""
        return self.widths is not None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Units of each group in the unpruned network."""
        return self._sizes

    def widths_for_ratio(self, ratio: PerLayer, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return the widths that a ratio leaves of the unpruned network, or of groups of these sizes."""
        kept, skip = self._pruner.kept_count, self._options.skip
        return selection.widths_for_ratio(ratio, sizes or self._sizes, skip=skip, limits=self.limits, kept=kept)

    def architecture(self) -> Architecture:
        """Return an architecture with these widths, the channels of highest index gone."""
        return self._cut_last(self.widths or self._sizes)[1]

    def narrowed(self) -> Iterator[tuple[ChannelGroup, int]]:
        """Yield the groups that lose units, where the options decide it, each with the number of units that stay."""
        for group in self.groups:
            if self.widths is not None and self.widths[group.name] < group.size:
                yield group, self.widths[group.name]

    def choose(self, scores: Scores) -> Choice:
        """Return the units to drop: those of the lowest scores.

        Parameters
        ----------
        scores : mapping of str to torch.Tensor
            For each of `groups`, by name, one finite number per unit.

        Raises
        ------
        UserError
            If the scores are not that, or if they leave every channel.
        """
        check_scores(scores, self._sizes)
        if self.widths is not None:
            return Choice(selection.drop_lowest(scores, self.widths), tuple(self._shortfall(self.widths)))
        widths, emptied = self._ranked_widths(scores)
        self._check_removal(widths)
        warnings = [f"{name}: the threshold would have emptied it; its best {widths[name]} stay" for name in emptied]
        warnings += [*selection.describe_thin(widths, self._sizes), *self._shortfall(widths)]
        if self.wanted is not None:
            warnings += self.wanted.describe_miss(self.cost_at(widths))
        return Choice(selection.drop_lowest(scores, widths), tuple(warnings))

    def cut(self, model: nn.Module, choice: Choice) -> PruneResult:
        """Return a copy of `model` without the units that were chosen."""
        pruned, architecture = self._drop(model, choice.drop)
        widths = {name: size - len(choice.drop.get(name, ())) for name, size in self._sizes.items()}
        return PruneResult(pruned, architecture, self.report(widths, choice.warnings))

    def reshuffled(self, layers: Sequence[LayerWidth], generator: torch.Generator) -> Architecture:
        """Return an architecture with these widths and random units of each group; groups that keep all stay whole."""
        drop: dict[str, list[int]] = {}
        for layer in layers:
            order = torch.randperm(self._sizes[layer.layer], generator=generator)
            drop[layer.layer] = sorted(order[layer.kept :].tolist())
        return self._drop(self.shapes, drop)[1]

    def resolved(self) -> Mapping[str, Any]:
        """Return what the pruner says its options stand for; that layers behind tokens are pruned came later."""
        behind_tokens = any(group.kind in OF_TOKENS for group in self.groups)
        return {**self._pruner.resolved, **({"tokens": True} if behind_tokens else {})}

    def rehearsal(self) -> Architecture:
        """Return an architecture as any scores would leave it: where they decide the widths, the narrowest."""
        return self._cut_last(self._narrowest)[1]

    def report(self, widths: Mapping[str, int] | None = None, warnings: tuple[str, ...] = ()) -> PruneReport:
        """Return what goes, if it is known or told as `widths`, and what cannot go."""
        kept = widths or self.widths or self._sizes
        layers = tuple(LayerWidth(name, kept[name], size) for name, size in self._sizes.items())
        # These the analysis could free; the pruner leaves them whole.
        untouched = (group for group in self.channels.groups(self._options.scope) if group.name not in self._sizes)
        reason = f"not for {self._options.name}, which leaves it alone"
        frozen = {**self.channels.frozen, **{group.name: reason for group in untouched}}
        return PruneReport(layers, frozen, (*self._warnings, *warnings))

    def _shortfall(self, widths: Mapping[str, int]) -> list[str]:
        options = self._options
        return selection.describe_shortfall(options.ratio, widths, self._sizes, skip=options.skip, limits=self.limits)

    def _check_removal(self, widths: Mapping[str, int]) -> None:
        if all(widths[name] == size for name, size in self._sizes.items()):
            option = self._options.target_option
            raise UserError(
                f"pruner.{option}={getattr(self._options, option)}: removes nothing from "
                f"{self.network} (with pruner.skip, min_channels and round_to as they are)"
            )

    def widths_from_options(self) -> dict[str, int]:
        """Return the widths that a usual target states."""
        options = self._options
        if options.variant is not None:
            variant = self._pruner.find_variant(options.variant, self.network)
            if "widths" in variant:
                return selection.explicit_widths(variant["widths"], self._sizes)
            # Published ratios are rounded by the pruner's rule alone.
            kept, skip = self._pruner.kept_count, variant.get("skip", ())
            return selection.widths_for_ratio(variant["ratio"], self._sizes, skip=skip, kept=kept)
        if options.widths is not None:
            return selection.explicit_widths(options.widths, self._sizes)
        if self.wanted is not None:
            return self.wanted.find_widths(self.widths_for_ratio, self.cost_at)
        assert options.ratio is not None
        return self.widths_for_ratio(options.ratio)

    def _ranked_widths(self, scores: Scores) -> tuple[dict[str, int], list[str]]:
        """Return the widths that one threshold for all channels leaves, and the groups it would empty."""
        options = self._options
        values = torch.cat(list(scores.values()))
        if bool((values == values[0]).all()):
            # So it is with batch norms that were never trained: the threshold would leave one channel of each layer.
            raise UserError(
                f"pruner.name={options.name}: all {len(values)} channels score {values[0]:g}, so none is worth less "
                "than another; give it a trained network, or pruner.ranking=layer"
            )

        def rank(ratio: float) -> tuple[dict[str, int], list[str]]:
            return selection.widths_for_global_ratio(ratio, scores, skip=options.skip, limits=self.limits)

        if self.wanted is None:
            assert isinstance(options.ratio, float)
            return rank(options.ratio)
        # The network is trained by now: what comes nearest is better than nothing.
        widths = self.wanted.find_widths(lambda ratio: rank(ratio)[0], self.cost_at, strict=False)
        self._check_removal(widths)
        # The highest score that goes. A group with nothing above it would have gone as a whole.
        dropped = selection.drop_lowest(scores, widths)
        threshold = max(scores[name][units].max() for name, units in dropped.items() if units)
        return widths, [name for name in widths if widths[name] < self._sizes[name] and scores[name].max() <= threshold]

    def cost_at(self, widths: Mapping[str, int]) -> Cost:
        """Return the cost of the network with these widths."""
        pruned, architecture = self._cut_last(widths)
        return count_cost(pruned, self.input_shape, masks=architecture.masks)

    def _cut_last(self, widths: Mapping[str, int]) -> tuple[nn.Module, Architecture]:
        # Which channels go decides neither shapes nor costs, so any will do: here those of highest index.
        return self._drop(self.shapes, {name: range(widths[name], size) for name, size in self._sizes.items()})

    def _drop(self, model: nn.Module, drop: Mapping[str, Sequence[int]]) -> tuple[nn.Module, Architecture]:
        """Return a copy of `model` without these units, removed or masked."""
        # A masked unit keeps its place, so the plan of the cut does not know it.
        removed = {name: units for name, units in drop.items() if name not in self.masked}
        pruned, architecture = apply(model, self.channels.plan(removed))
        masks: dict[str, torch.Tensor] = {}
        for group in self.groups:
            if group.name in self.masked and drop.get(group.name):
                # Gamma and beta as well: a batch norm makes a constant of a filter that is zero.
                for module in (*group.layers, *group.norms):
                    for kind, parameter in pruned.get_submodule(module).named_parameters(recurse=False):
                        mask = torch.ones(parameter.shape, dtype=torch.bool)
                        mask[list(drop[group.name])] = False
                        masks[f"{module}.{kind}"] = mask
        apply_masks(pruned, masks)
        return pruned, replace(architecture, masks=masks)


Options = TypeVar("Options", bound=ChannelOptions)


class Channelwise(Pruner[Options, ChannelTarget]):
    """Base of the pruners that remove channels, however they choose them.

    Attributes
    ----------
    options_type : type
        :class:`rethink_prune.config.ChannelOptions`, or a subclass with options of its own.
    selecting : {"norm", "conv"}, optional
        Which modules select channels from streams that stay whole; see :func:`rethink_prune.surgery.channels.analyse`.
    meant_for : str
        What alone it can prune, for messages; empty if that is channels of any kind.
    """

    options_type: ClassVar[type[PrunerOptions]] = ChannelOptions
    selecting: Literal["norm", "conv"] | None = None
    in_rounds: ClassVar[bool] = True
    meant_for: ClassVar[str] = ""

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> ChannelTarget:
        """Find the groups that may be pruned, and, where the options alone decide it, their widths."""
        return ChannelTarget(self, model, example, network or type(model).__name__)

    def find_groups(self, model: nn.Module, channels: Channels) -> tuple[tuple[ChannelGroup, ...], Collection[str]]:
        """Return the groups to choose among, in network order, and the names of those to mask instead of removing."""
        return tuple(group for group in channels.groups(self.options.scope) if self.may_touch(group)), ()

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether this pruner prunes the group; by default, all but the features of a classifier.

        These are of kind ``linear``: what a linear layer computes of one vector per image. Kinds that go by default are
        ``conv``, ``selection``, ``tokens`` (hidden units of linear layers that read tokens) and ``heads``.
        """
        return group.kind != "linear"

    def find_widths(self, target: ChannelTarget) -> dict[str, int]:
        """Return the units to keep of each group, where the options decide it; called while `target` is made."""
        return target.widths_from_options()

    @property
    def resolved(self) -> Mapping[str, Any]:
        """What options that name files stand for; see :meth:`Target.resolved`."""
        return {}

    def kept_count(self, size: int, ratio: float) -> int:
        """Return how many of `size` channels remain when a share of `ratio` goes."""
        return kept_count(size, ratio)


class ChannelPruner(Channelwise[Options]):
    """Removes the channels of lowest score. A subclass defines :meth:`scores`; all else has a default.

    Examples
    --------
    >>> from rethink_prune import build_model
    >>> from rethink_prune.config import ChannelOptions
    >>> class LastChannels(ChannelPruner):
    ...     def scores(self, model, groups, *, data, generator):
    ...         return {group.name: -torch.arange(group.size) for group in groups}
    >>> pruner, model = LastChannels(ChannelOptions(name="last", ratio=0.5)), build_model("vgg11")
    >>> target = pruner.target(model, torch.zeros(1, 3, 32, 32))
    >>> pruner.prune(model, target, data=None, generator=torch.Generator()).report.layers[0]
    LayerWidth(layer='features.0', kept=32, full=64)
    """

    @abstractmethod
    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return one finite score per unit for each group, by the group's name; the lowest go first.

        Parameters
        ----------
        model : torch.nn.Module
            The network, on the CPU; not to be changed.
        groups : sequence of ChannelGroup
            What may be pruned.
        data, generator
            As for :meth:`prune`.
        """

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Score, choose and cut."""
        scores = self.scores(model, target.groups, data=data, generator=generator)
        return target.cut(model, target.choose(scores))


def hint_at_tokens(channels: Channels, scope: str) -> str:
    """Return which pruners prune what a transformer has, if it has such groups; empty otherwise."""
    kinds = {group.kind for group in channels.groups(scope)}
    return FOR_TOKENS if kinds.intersection(OF_TOKENS) else ""


def rows_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight whose rows are a layer's output positions; of attention, queries, keys and values.

    Examples
    --------
    >>> len(rows_of(nn.Linear(4, 8))), len(rows_of(nn.MultiheadAttention(4, 2)))
    (8, 12)
    """
    return layer.get_parameter("in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight")


def score_units(
    units: Iterable[Mapping[str, Positions]],
    measure: Callable[[str], torch.Tensor],
    combine: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return one score per unit from a measure of single channels.

    Parameters
    ----------
    units : iterable of mappings from str to tuple of int
        For each unit, its channels in each module.
    measure : callable
        From a module's name to one number for each of its channels.
    combine : callable
        From the numbers of all channels of a unit to its score.

    Examples
    --------
    >>> measures = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
    >>> score_units([{"a": (0,), "b": (0, 1)}, {"a": (1,)}], measures.__getitem__, torch.sum)
    tensor([9., 2.])
    """
    return torch.stack(
        [combine(torch.cat([measure(name)[list(positions)] for name, positions in unit.items()])) for unit in units]
    )
