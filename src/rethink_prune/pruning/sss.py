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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import nn

from rethink_prune.config import Frozen, Positive, PrunerOptions, VariantName
from rethink_prune.cost import layer_macs, on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import hint_at_tokens
from rethink_prune.pruning.factors import KINDS, Kind, ScalingFactors, Structure, find_blocks, find_layers
from rethink_prune.pruning.pruner import Batches, LayerWidth, Pruner, PruneReport, PruneResult, Target, Variants
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channels import Positions, analyse
from rethink_prune.surgery.cut import apply
from rethink_prune.surgery.graph import module_calls, trace

# Of each stage: how many blocks remain, and whether its first, which has the projection, is among them.
Remaining = Mapping[str, tuple[int, bool]]


# In the authors' configuration for ResNet-50 on ImageNet; it weighs the L1 norm against a batch's mean loss, as here.
PUBLISHED_STRENGTH = 0.01


class SparseOptions(Frozen):
    """How the factors are trained: the weight of their L1 norm in the loss, and Nesterov's momentum.

    Without `strength`, it is the recipe's or the published one.
    """

    strength: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class SSSOptions(PrunerOptions):
    """Options of `SSS`.

    Without `structures`, these are the blocks and groups that the network has; its channels if it has neither. A
    `variant` removes the published blocks, whatever the factors say.
    """

    structures: tuple[Kind, ...] | None = None
    variant: VariantName = None
    sparse: SparseOptions = SparseOptions()
    # Refused by name instead of as unknown keys: a reader may expect them here as well.
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

    @field_validator("structures")
    @classmethod
    def _structures_differ(cls, structures: tuple[Kind, ...] | None) -> tuple[Kind, ...] | None:
        # One comparison for both: an empty list is shorter than one.
        if structures is not None and len(set(structures)) != max(1, len(structures)):
            raise ValueError("name each of blocks, groups and channels at most once, and at least one")
        return structures

    @model_validator(mode="after")
    def _variants_are_of_blocks(self) -> SSSOptions:
        if self.variant is not None and self.structures not in (None, ("blocks",)):
            raise ValueError(f"variant={self.variant} removes blocks; use it with structures=null")
        return self

    @property
    def target_option(self) -> str:
        """Name of the option that states the target: a variant, or else the strength."""
        return "strength" if self.variant is None else "variant"

    @property
    def strength(self) -> float:
        """Weight of the factors' L1 norm in the loss."""
        return self.sparse.strength or PUBLISHED_STRENGTH

    def with_strength(self, recipe: float | None, *, network: str, dataset: str) -> Self:
        """Return the options with a strength."""
        strength = self.sparse.strength or recipe or PUBLISHED_STRENGTH
        return self.model_copy(update={"sparse": self.sparse.model_copy(update={"strength": strength})})


class SSSTarget(Target):
    """The structures of one network that have factors, and, with a variant, the branches that go.

    Parameters
    ----------
    options : SSSOptions
    remaining : mapping of str to (int, bool), optional
        Of a variant: how many blocks remain in each stage, and whether its first is among them.
    model, example
        See `Target`.
    network : str
        The network's name, for messages.

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

    def __init__(
        self, options: SSSOptions, remaining: Remaining | None, model: nn.Module, example: torch.Tensor, network: str
    ) -> None:
        super().__init__(model, example)
        self._strength = options.strength
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
                hint = "" if has else hint_at_tokens(self._channels, "inner")
                raise UserError(
                    f"pruner.{where}: finds no {kind} that factors can scale in {network}{why}; "
                    f"it has {' and '.join(has) or 'nothing else either'}"
                    + (f", so it has no meaning there; {hint}" if hint else "")
                )
        self.structures = tuple(structure for kind in KINDS if kind in kinds for structure in found[kind])
        self.gone = None if remaining is None else _pruned_blocks(blocks, remaining)
        # Where only blocks go, it does not matter which channels could not.
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

    def reshuffled(self, layers: Sequence[LayerWidth], generator: torch.Generator) -> Architecture:
        """Return an architecture with as many random blocks of each kind, and random groups and channels of each layer.

        Blocks are of one kind if their branches hold the same modules at the same cost: those of a stage, without the
        first, which changes the shape. A block that takes another's place has as many groups and channels as that one.
        """
        kept = {layer.layer: layer.kept for layer in layers}
        kinds: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for block, branch in self._branches.items():
            inside = (s.name for s in self.structures if s.kind != "blocks" and s.module in branch)
            kinds.setdefault(tuple(branch.values()), []).append((block, *inside))
        for blocks in kinds.values():
            counts = [[kept[name] for name in names] for names in blocks if kept[names[0]]]
            places = torch.randperm(len(blocks), generator=generator)[: len(counts)].tolist()
            kept |= dict.fromkeys((name for names in blocks for name in names), 0)
            for place, remaining in zip(sorted(places), counts, strict=True):
                kept |= zip(blocks[place], remaining, strict=True)
        gone: dict[str, Sequence[int]] = {}
        for structure in self.structures:
            order = torch.randperm(len(structure.units), generator=generator)
            gone[structure.name] = sorted(order[kept[structure.name] :].tolist())
        return self.cut(self.shapes, gone).architecture

    @cached_property
    def _branches(self) -> dict[str, dict[str, str]]:
        """For each block, the modules with parameters of its branch by name, each with what it is and its MACs."""
        blocks = tuple(structure.name for structure in self.structures if structure.kind == "blocks")
        if not blocks:
            return {}
        remaining = dict(remove_branches(self.shapes, blocks).named_modules())
        macs = layer_macs(self.shapes, self.input_shape)
        branches: dict[str, dict[str, str]] = {}
        branch: dict[str, str] = {}
        # In order of execution, so that each branch stands together; its last module has the block's name.
        for name in module_calls(trace(on_meta(self.shapes))):
            module = self.shapes.get_submodule(name)
            if name not in remaining and [*module.parameters()]:
                # The same modules at another resolution cost other MACs.
                branch[name] = f"{module} {macs.get(name, 0)}"
            if name in blocks:
                branches[name], branch = branch, {}
        return branches

    def zeros(self, model: nn.Module) -> dict[str, list[int]]:
        """Return the units of each structure that output zeros alone, by its name.

        Raises
        ------
        UserError
            If there are none.
        """
        magnitudes = {structure.name: structure.magnitudes(model) for structure in self.structures}
        zeros = {name: (values == 0).nonzero().flatten().tolist() for name, values in magnitudes.items()}
        if not any(zeros.values()):
            # How near the weakest came tells the user how much stronger the penalty has to be.
            weakest = min(magnitudes, key=lambda name: magnitudes[name].min().item())
            raise UserError(
                "pruner.name=sss: no factor reached zero, so there is nothing to remove; raise "
                f"pruner.sparse.strength={self._strength:g} "
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
        modules = dict((remove_branches(self.shapes, removed) if removed else self.shapes).named_modules())
        drop: dict[str, Sequence[int]] = {}
        widths, emptied = [], []
        for structure in self.structures:
            name, full = structure.name, len(structure.units)
            kept = full - len(gone.get(name, ()))
            if structure.kind != "blocks" and structure.module not in modules:
                kept = 0  # gone with its block
            elif structure.kind != "blocks":
                drop[name] = gone.get(name, ())
                if kept == 0:
                    # A convolution without channels runs and returns nothing of use.
                    kept, drop[name] = 1, drop[name][1:]
                    emptied.append(f"{name}: all of its factors are zero; one of its {structure.kind} stays")
            widths.append(LayerWidth(name, kept, full))
        # Channels first: their plan is for the graph with all branches.
        pruned, architecture = apply(model, self._channels.plan(drop))
        if removed:
            pruned, architecture = remove_branches(pruned, removed), replace(architecture, removed=removed)
        report = PruneReport(tuple(widths), self._frozen, (*self._warnings, *emptied))
        return PruneResult(pruned, architecture, report)


class SSS(Pruner[SSSOptions, SSSTarget]):
    """Trains scaling factors on structures, and removes those whose factor is zero.

    :source: Huang and Wang 2018
    :goes: blocks, groups, channels
    :by: scaling factors that training sets to exactly zero; no ratio: `pruner.sparse.strength` decides
    :trains: factors with a proximal step
    """

    name = "sss"
    position = 5
    options_type = SSSOptions
    trains_sparse = True
    no_rounds = "the strength of its penalty decides how much goes, in one training of the unpruned network"
    variants: ClassVar[Variants] = {
        "preact_resnet50": {
            "41": {"blocks": {"layer1": (0, False), "layer2": (4, True), "layer3": (6, True), "layer4": (3, True)}},
            "32": {"blocks": {"layer1": (1, False), "layer2": (4, True), "layer3": (4, True), "layer4": (1, True)}},
            "26": {"blocks": {"layer1": (0, False), "layer2": (2, False), "layer3": (5, False), "layer4": (1, True)}},
        }
    }

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> SSSTarget:
        """Find the structures of a network."""
        network, name = network or type(model).__name__, self.options.variant
        remaining = None if name is None else self.find_variant(name, network)["blocks"]
        return SSSTarget(self.options, remaining, model, example, network)

    def sparse(self, target: SSSTarget) -> ScalingFactors:
        """Return the factors on the target's structures, and how they are trained."""
        # A module may end a branch and give a layer's channels too; it has one list of factors.
        units: dict[str, tuple[Positions, ...]] = {}
        for structure in target.structures:
            units[structure.module] = (*units.get(structure.module, ()), *structure.units)
        sparse = self.options.sparse
        return ScalingFactors(units, strength=self.options.strength, momentum=sparse.momentum)

    def prune(self, model: nn.Module, target: SSSTarget, *, data: Batches, generator: torch.Generator) -> PruneResult:
        """Remove what outputs zeros alone, or the variant's branches.

        Raises
        ------
        UserError
            If nothing is zero.
        """
        return target.cut(model, target.zeros(model) if target.gone is None else target.gone)


def _pruned_blocks(blocks: Sequence[Structure], remaining: Remaining) -> Mapping[str, tuple[int, ...]]:
    """Return the blocks that go, each with its one unit, if so many of each stage remain, with or without the first."""
    pruned: list[str] = []
    for stage, (count, with_first) in remaining.items():
        # Which of the later blocks remain is not published; their costs are equal, so take the earliest.
        names = [block.name for block in blocks if block.name.startswith(f"{stage}.")]
        start = 0 if with_first else 1
        pruned += [*names[:start], *names[start + count :]]
    return dict.fromkeys(pruned, (0,))
