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
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import fx, nn

from rethink_prune.config import Frozen, Positive, PrunerOptions
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning import surgery
from rethink_prune.pruning.channels import ChannelGroup, Positions, analyse
from rethink_prune.pruning.factors import ScalingFactors, can_scale, unit_magnitudes
from rethink_prune.pruning.graph import evaluate, trace
from rethink_prune.pruning.hooks import TrainingHooks
from rethink_prune.pruning.pruner import (
    Batches,
    LayerWidth,
    Pruner,
    PruneReport,
    PruneResult,
    Target,
    find_variant,
)
from rethink_prune.pruning.rules import operation_name

Kind = Literal["blocks", "groups", "channels"]


class SparseOptions(Frozen):
    """How the factors are trained: the weight of their L1 norm in the loss, and Nesterov's momentum."""

    strength: Positive = 1e-2
    momentum: float = Field(0.9, ge=0, lt=1)


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
        In network order, blocks first.
    removed : tuple of str, or None
        Last modules of the branches that a variant removes; None where the factors decide.

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
        self._frozen: dict[str, str] = {}
        self._warnings = self._channels.warnings
        found = [*self._blocks(), *self._layers()]
        has = {structure.kind: None for structure in found}
        wanted = options.structures or (("blocks",) if variant else _default(tuple(has)))
        for kind in wanted:
            if kind not in has:
                raise UserError(
                    f"pruner.structures=[{', '.join(wanted)}]: finds no {kind} that factors can scale in {network}; "
                    f"it has {' and '.join(has) or 'nothing of the kind'}"
                    + "".join(f" ({warning})" for warning in self._warnings)
                )
        self.structures = tuple(structure for structure in found if structure.kind in wanted)
        if wanted == ("blocks",):
            self._frozen.clear()
        self.removed = None if variant is None else self._other_blocks(variant["blocks"])
