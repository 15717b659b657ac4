"""Sparse Structure Selection (Huang and Wang 2018, *Data-Driven Sparse Structure Selection*, arXiv:1707.01213).

Scales the output of every structure - a residual branch before its addition, a group of a grouped convolution, a
channel - by a factor, trains factors and weights together with an L1 penalty on the factors, and removes the
structures whose factors became exactly zero. How much goes is not told by a ratio: the strength of the penalty decides.
See `factors` for the optimisation.

Factors sit where a structure's output is final: on the module that ends the branch, or on the last batch norm that the
channels pass before anything else reads them (the convolution, where there is none). When training ends they are folded
into that module, so what is zero is seen in the weights alone: :meth:`SSS.prune` removes a branch whose last module
returns zeros, and channels whose scale and shift (or filter and bias) are zero. Of channels that are all zero, in a
layer that remains, one stays. A pruned first block of a stage keeps its projection.

``41``, ``32`` and ``26`` are the published pre-activation ResNet-50s: how many blocks of each stage remain, and whether
the first, which has the projection, is among them. Which of the later blocks remain is not published; the earliest
do here, which neither parameters nor MACs depend on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from rethink_prune.config import Frozen, Positive, PrunerOptions
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.factors import ScalingFactors, can_scale, unit_magnitudes
from rethink_prune.pruning.pruner import (
    Batches,
    LayerWidth,
    Pruner,
    PruneReport,
    PruneResult,
    Target,
    find_variant,
)
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.branches import is_addition, remove_branches
from rethink_prune.surgery.channels import ChannelGroup, Positions, analyse
from rethink_prune.surgery.cut import apply
from rethink_prune.surgery.graph import infer_values, operation_name, trace
from rethink_prune.training.hooks import TrainingHooks

Kind = Literal["blocks", "groups", "channels"]
KINDS: tuple[Kind, ...] = ("blocks", "groups", "channels")

# Modules and operations that may stand between a branch's last convolution or batch norm and the addition.
_KEEP_ZERO = ("Identity", "Dropout", "Dropout2d", "ReLU", "dropout", "stochastic_depth", "relu", "mul")


class SparseOptions(Frozen):
    """How the factors are trained: the weight of their L1 norm in the loss, and Nesterov's momentum."""

    strength: Positive = 0.25
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class SSSOptions(PrunerOptions):
    """Options of `SSS`.

    Without `structures`, these are the blocks and groups that the network has; its channels if it has neither. A
    `variant` removes the published blocks, whatever the factors say.
    """

    structures: tuple[Kind, ...] | None = None
    variant: str | None = None
    sparse: SparseOptions = SparseOptions()
    ratio: None = None
    widths: None = None
    target_macs: None = None
    target_params: None = None

    @field_validator("ratio", "widths", "target_macs", "target_params", mode="before")
    @classmethod
    def _strength_decides(cls, value: object, info: ValidationInfo) -> object:
        if value is not None:
            raise ValueError(
                f"sss takes no {info.field_name}; pruner.sparse.strength decides how much goes "
                "(or give a published variant)"
            )
        return value

    @field_validator("variant", mode="before")
    @classmethod
    def _variants_are_numbers(cls, variant: object) -> object:
        return str(variant) if type(variant) is int else variant  # pruner.variant=41 arrives as a number

    @field_validator("structures")
    @classmethod
    def _structures_differ(cls, structures: tuple[Kind, ...] | None) -> tuple[Kind, ...] | None:
        if structures is not None and len(set(structures)) != max(1, len(structures)):
            raise ValueError("name each of blocks, groups and channels at most once, and at least one")
        return structures

    @model_validator(mode="after")
    def _variants_are_of_blocks(self) -> SSSOptions:
        if self.variant is not None and self.structures not in (None, ("blocks",)):
            raise ValueError(f"variant={self.variant} removes blocks; use it with structures=null")
        return self

    @property
    def target(self) -> str:
        """Name of what says how much goes: a variant, or else the strength."""
        return "strength" if self.variant is None else "variant"

    @property
    def strength(self) -> float:
        """Weight of the factors' L1 norm in the loss."""
        return self.sparse.strength


@dataclass(frozen=True)
class Structure:
    """What may go unit by unit: a residual branch (one unit), or the groups or channels of a layer.

    Attributes
    ----------
    name : str
        The branch's last module, or the channel group's name.
    kind : {"blocks", "groups", "channels"}
    module : str
        The convolution or batch norm that gives the structure's output; its factors sit there.
    units : tuple of tuple of int
        Output channels of that module, for each unit.
    """

    name: str
    kind: Kind
    module: str
    units: tuple[Positions, ...]


class SSSTarget(Target):
    """The structures of one network that have factors, and, with a variant, the branches that go.

    Parameters
    ----------
    pruner : SSS
        With its options, an `SSSOptions`.
    model, example
        See `Target`.
    network : str, optional
        The network's name, to look up variants.

    Attributes
    ----------
    structures : tuple of Structure
        Blocks first, each kind in network order.
    gone : mapping of str to tuple of int, or None
        What a variant removes, as for :meth:`cut`; None where the factors decide.

    Raises
    ------
    UserError
        If the network does not have the structures or the variant.
    """

    def __init__(self, pruner: SSS, model: nn.Module, example: torch.Tensor, network: str | None = None) -> None:
        super().__init__(model, example)
        options: SSSOptions = pruner.options
        network = network or type(model).__name__
        variant = None if options.variant is None else find_variant(pruner, network)
        self._channels = analyse(model, example)
        blocks, problem = find_blocks(model, example)
        layers, left_whole = find_layers(model, self._channels.groups("inner"))
        found = {kind: tuple(s for s in (*blocks, *layers) if s.kind == kind) for kind in KINDS}
        has = tuple(kind for kind in KINDS if found[kind])
        kinds = options.structures or tuple(kind for kind in has if kind != "channels") or ("channels",)
        for kind in kinds:
            if kind not in has:
                where = f"structures=[{', '.join(kinds)}]" if options.structures else f"name={options.name}"
                why = f" ({problem})" if kind == "blocks" and problem else ""
                raise UserError(
                    f"pruner.{where}: finds no {kind} that factors can scale in {network}{why}; "
                    f"it has {' and '.join(has) or 'nothing else either'}"
                )
        self.structures = tuple(structure for kind in KINDS if kind in kinds for structure in found[kind])
        self.gone = None if variant is None else _pruned_blocks(blocks, variant["blocks"])
        self._frozen: Mapping[str, str] = {}
        self._warnings = (problem,) if problem and options.structures is None else ()
        if set(kinds) != {"blocks"}:
            self._frozen = {**self._channels.frozen, **left_whole}
            self._warnings = (*self._channels.warnings, *self._warnings)

    @property
    def known(self) -> bool:
        """Whether a variant says what goes."""
        return self.gone is not None

    def architecture(self) -> Architecture:
        """Return the variant's architecture."""
        return self.cut(self.shapes, self.gone or {}).architecture

    def report(self) -> PruneReport:
        """Return the branches that go, if they are known, and what cannot go."""
        return self.cut(self.shapes, self.gone or {}).report

    def zeros(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the units of each structure that output zeros alone, by its name.

        Raises
        ------
        UserError
            If there are none.
        """
        magnitudes = {
            structure.name: unit_magnitudes(model.get_submodule(structure.module), structure.units)
            for structure in self.structures
        }
        zeros = {name: (values == 0).nonzero().flatten().tolist() for name, values in magnitudes.items()}
        if not any(zeros.values()):
            weakest = min(magnitudes, key=lambda name: magnitudes[name].min().item())
            raise UserError(
                "pruner.name=sss: no factor reached zero, so there is nothing to remove; raise pruner.sparse.strength "
                f"(the largest weight behind the weakest factor is {magnitudes[weakest].min():.2g}, of {weakest})"
            )
        return zeros

    def cut(self, model: nn.Module, gone: Mapping[str, Sequence[int]]) -> PruneResult:
        """Return a copy of `model` without some units.

        Parameters
        ----------
        model : torch.nn.Module
            Stays as it is.
        gone : mapping of str to sequence of int
            By a structure's name: the indexes of units to remove. One unit remains of a layer that remains.
        """
        removed = tuple(s.name for s in self.structures if s.kind == "blocks" and gone.get(s.name))
        remaining = dict((remove_branches(self.shapes, removed) if removed else self.shapes).named_modules())
        drop: dict[str, Sequence[int]] = {}
        widths, emptied = [], []
        for structure in self.structures:
            name, full = structure.name, len(structure.units)
            kept = full - len(gone.get(name, ()))
            if structure.kind != "blocks" and structure.module not in remaining:
                kept = 0
            elif structure.kind != "blocks":
                drop[name] = gone.get(name, ())
                if kept == 0:
                    kept, drop[name] = 1, drop[name][1:]
                    emptied.append(f"{name}: all of its factors are zero; one of its {structure.kind} stays")
            widths.append(LayerWidth(name, kept, full))
        pruned, architecture = apply(model, self._channels.plan(drop))
        if removed:
            pruned, architecture = remove_branches(pruned, removed), replace(architecture, removed=removed)
        report = PruneReport(tuple(widths), self._frozen, (*self._warnings, *emptied))
        return PruneResult(pruned, architecture, report)


class SSS(Pruner):
    """Trains scaling factors on blocks, groups or channels, and removes those whose factor is zero."""

    options_type = SSSOptions
    trains_sparse = True
    # Blocks that remain in each stage, and whether its first is among them.
    variants: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "preact_resnet50": {
            "41": {"blocks": {"layer1": (0, False), "layer2": (4, True), "layer3": (6, True), "layer4": (3, True)}},
            "32": {"blocks": {"layer1": (1, False), "layer2": (4, True), "layer3": (4, True), "layer4": (1, True)}},
            "26": {"blocks": {"layer1": (0, False), "layer2": (2, False), "layer3": (5, False), "layer4": (1, True)}},
        }
    }

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> SSSTarget:
        """Find the structures of a network; see `Pruner.target`."""
        return SSSTarget(self, model, example, network)

    def sparse(self, target: Target) -> TrainingHooks:
        """Return the factors on the target's structures, and how they are trained."""
        assert isinstance(target, SSSTarget)
        units: dict[str, tuple[Positions, ...]] = {}
        for structure in target.structures:
            units[structure.module] = (*units.get(structure.module, ()), *structure.units)
        sparse = self.options.sparse
        return ScalingFactors(units, strength=sparse.strength, momentum=sparse.momentum)

    def prune(self, model: nn.Module, target: Any, *, data: Batches | None, generator: torch.Generator) -> PruneResult:
        """Remove what outputs zeros alone, or the variant's branches; `data` and `generator` are not used.

        Parameters
        ----------
        model : torch.nn.Module
            The network of the stage ``sparse``, its factors folded into its weights.
        target : SSSTarget
            What :meth:`target` returned.
        data, generator
            As for :meth:`Pruner.scores`.

        Raises
        ------
        UserError
            If nothing is zero.
        """
        return target.cut(model, target.gone if target.known else target.zeros(model))


def find_blocks(model: nn.Module, example: torch.Tensor) -> tuple[tuple[Structure, ...], str | None]:
    """Find the residual branches of a network that factors can scale.

    A branch is the operand of an addition with more convolutions of its own; the other operand, with one at most (a
    projection), is the shortcut.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    example : torch.Tensor
        One batch of its input.

    Returns
    -------
    blocks : tuple of Structure
    problem : str, or None
        Why there are none, although there are branches.
    """
    network = on_meta(model)
    graph = trace(network)
    values = infer_values(graph, network, tuple(example.shape))
    modules = dict(network.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes)
    convolutions: dict[fx.Node, frozenset[fx.Node]] = {}  # those each node depends on
    ends: list[str] = []
    for node in graph.nodes:
        is_convolution = node.op == "call_module" and isinstance(modules[str(node.target)], _ConvNd)
        convolutions[node] = frozenset([node] if is_convolution else ()).union(
            *(convolutions[operand] for operand in node.all_input_nodes)
        )
        if not is_addition(node):
            continue
        if not all(isinstance(values[operand], torch.Tensor) for operand in (node, *node.all_input_nodes)):
            continue  # an addition of numbers, such as sizes
        common = frozenset.intersection(*(convolutions[operand] for operand in node.all_input_nodes))
        own = {operand: len(convolutions[operand] - common) for operand in node.all_input_nodes}
        shortcut, branch = sorted(own, key=own.__getitem__)
        if own[shortcut] > 1 or own[shortcut] == own[branch] or values[shortcut].shape != values[node].shape:
            continue
        end = _last_module(branch, modules)
        if end is not None and calls[end] == 1:
            ends.append(end)
    if not ends:
        return (), None
    try:
        remove_branches(network, ends)
    except UserError as error:
        return (), str(error)
    return tuple(
        Structure(end, "blocks", end, (tuple(range(len(modules[end].get_parameter("weight")))),)) for end in ends
    ), None


def find_layers(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[tuple[Structure, ...], Mapping[str, str]]:
    """Find where factors can scale groups of channels.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    groups : sequence of ChannelGroup
        From its analysis.

    Returns
    -------
    layers : tuple of Structure
        Of the kind "groups" where a unit is a group of a grouped convolution.
    left_whole : mapping of str to str
        The other groups of convolutions by name, with the reason.
    """
    network = on_meta(model)
    calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in trace(network).nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    layers: list[Structure] = []
    left_whole: dict[str, str] = {}
    for group in groups:
        if group.kind != "conv":
            continue
        own = {*group.layers, *group.norms}
        if any(len(calls[name]) != 1 for name in own):
            left_whole[group.name] = "one of its layers runs more than once, or in training alone"
            continue
        passed = _modules_in_a_row(calls[group.layers[0]][0])
        last = [name for name in passed if name in own][-1]
        units = group.norms[last] if last in group.norms else tuple(unit[last] for unit in group.units)
        # A factor silences channels for all their readers only where all of them pass before anything else reads them.
        if own - set(passed) or not all(units):
            left_whole[group.name] = "no single convolution or batch norm outputs its channels to all their readers"
        elif not can_scale(network.get_submodule(last)):
            left_whole[group.name] = f"{last}: cannot be scaled"
        else:
            grouped = any(
                network.get_submodule(layer).groups != 1 and len(positions) > 1
                for layer, positions in group.units[0].items()
            )
            layers.append(Structure(group.name, "groups" if grouped else "channels", last, units))
    return tuple(layers), left_whole


def _modules_in_a_row(node: fx.Node) -> list[str]:
    """Return the modules that a result passes one after the other before a second value or reader comes in."""
    passed = [str(node.target)]
    while len(node.users) == 1:
        (node,) = node.users
        if len(node.all_input_nodes) != 1:
            break
        if node.op == "call_module":
            passed.append(str(node.target))
    return passed


def _last_module(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the module a branch ends in, if it can be scaled, and if its zeros reach the addition as zeros."""
    while len(node.users) == 1:
        if node.op == "call_module" and can_scale(modules[str(node.target)]):
            return str(node.target)
        name = type(modules[str(node.target)]).__name__ if node.op == "call_module" else operation_name(node)
        if name not in _KEEP_ZERO or len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return None


def _pruned_blocks(blocks: Sequence[Structure], kept: Mapping[str, tuple[int, bool]]) -> Mapping[str, tuple[int, ...]]:
    """Return the blocks that go, each with its one unit, if so many of each stage remain, with or without the first."""
    pruned: list[str] = []
    for stage, (count, with_first) in kept.items():
        names = [block.name for block in blocks if block.name.startswith(f"{stage}.")]
        start = 0 if with_first else 1
        pruned += [*names[:start], *names[start + count :]]
    return dict.fromkeys(pruned, (0,))
