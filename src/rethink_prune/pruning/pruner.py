"""What every pruner is: options, a target made of them for one network, and how it prunes.

Most pruners score channels: those are a :class:`~rethink_prune.pruning.channel_pruner.ChannelPruner`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypedDict, TypeVar

import torch
from torch import nn

from rethink_prune.config import PerLayerRatio, PrunerOptions, Widths
from rethink_prune.cost import Cost, count_cost, on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.hooks import TrainingHooks

# Training batches of (images, labels), if there are any.
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]] | None
# Ends the message of a pruner that has no meaning for a transformer.
FOR_TOKENS = "l1, fpgm, random, taylor, thinet and regression prune hidden units and heads"


class Variant(TypedDict, total=False):
    """A published target: the widths, or a ratio with layers to skip; for `sss`, the blocks that remain."""

    widths: Widths
    ratio: PerLayerRatio
    skip: Sequence[str]
    blocks: Mapping[str, tuple[int, bool]]


# By network name and variant name.
Variants = Mapping[str, Mapping[str, Variant]]


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
        Operations the analysis does not know, and layers that keep more than the target says.
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
    """What is to go from one network: a pruner's options applied to it, before its weights are known.

    Parameters
    ----------
    model : torch.nn.Module
        The unpruned network; left as it is.
    example : torch.Tensor
        One batch of its input; only its shape and type matter.

    Attributes
    ----------
    shapes : torch.nn.Module
        A copy of the network without values, on the meta device.
    input_shape : tuple of int
        Shape of one image.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        # A target lives as long as its study, and needs no values: a copy of the weights would only take memory.
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
        """Return the architecture that the options define; without meaning unless `known`."""

    @abstractmethod
    def report(self) -> PruneReport:
        """Return what goes if it is known, and what cannot go."""

    def reshuffled(self, layers: Sequence[LayerWidth], generator: torch.Generator) -> Architecture:
        """Return an architecture that keeps as much of each layer, at positions drawn at random.

        It costs what the pruned network costs.

        Parameters
        ----------
        layers : sequence of LayerWidth
            What each layer keeps: those of a report that this target gave.
        generator : torch.Generator
            Decides the positions.

        Raises
        ------
        UserError
            If the pruner does not define it.
        """
        raise UserError(f"{type(self).__name__}: does not define reshuffled(), which draws positions at random")

    def resolved(self) -> Mapping[str, Any]:
        """Return what options that name files stand for: it takes their place in keys and in what reports compare."""
        return {}

    def rehearsal(self) -> Architecture:
        """Return an architecture as this target leaves it, to try; by default the empty one unless `known`."""
        return self.architecture() if self.known else Architecture()

    @cached_property
    def known_architecture(self) -> Architecture:
        """What `architecture` returns, made once: planning a large network takes a noticeable part of a second."""
        return self.architecture()

    @cached_property
    def cost(self) -> Cost:
        """Cost of the pruned network; without meaning unless `known`."""
        pruned = reshape(self.shapes, self.known_architecture)
        return count_cost(pruned, self.input_shape, masks=self.known_architecture.masks)


Options = TypeVar("Options", bound=PrunerOptions)
TargetType = TypeVar("TargetType", bound=Target)


class Pruner(ABC, Generic[Options, TargetType]):
    """Decides what goes, and takes it away.

    Parameters
    ----------
    options : PrunerOptions
        Of the class `options_type`.

    Attributes
    ----------
    name : str
        Of a built-in pruner: its name in ``pruner=``.
    position : int
        Where a built-in pruner stands in tables and messages; equal ones follow by name.
    options_type : type
        The class of its options.
    variants : mapping
        Published targets: network name -> variant name -> what it stands for.
    trains_sparse : bool
        Whether it trains the network its own way; then :meth:`sparse` says how.
    needs_data : bool
        Whether :meth:`prune` reads training images.
    at_start : bool
        Whether it prunes the network as it was drawn, before any training.
    in_rounds : bool
        Whether it can prune a network that it has pruned before.
    no_rounds : str
        Why it cannot, if it cannot.
    fresh_only : bool
        Whether it decides an architecture alone, so that there are no weights to inherit.
    seed : int
        Of the study: decides what a target draws that is known before any training.
    """

    name: ClassVar[str]
    position: ClassVar[int] = 100
    options_type: ClassVar[type[PrunerOptions]]
    variants: ClassVar[Variants] = {}  # replaced, never changed
    trains_sparse: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    at_start: ClassVar[bool] = False
    in_rounds: ClassVar[bool] = False
    no_rounds: ClassVar[str] = "its class does not say that it can (in_rounds = True)"
    fresh_only: ClassVar[bool] = False
    seed: int = 0

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> TargetType:
        """Apply the options to a network.

        Parameters
        ----------
        model : torch.nn.Module
            Left as it is.
        example : torch.Tensor
            One batch of the network's input.
        network : str, optional
            The network's name, for messages and to look up variants.

        Raises
        ------
        UserError
            If the options do not fit the network, e.g. a variant it does not have.
        """

    @abstractmethod
    def prune(self, model: nn.Module, target: TargetType, *, data: Batches, generator: torch.Generator) -> PruneResult:
        """Return a pruned copy of `model`.

        Parameters
        ----------
        model : torch.nn.Module
            The trained network (of the stage ``sparse`` if there is one), on the CPU; not to be changed.
        target : Target
            What :meth:`target` returned.
        data : iterable of (images, labels), optional
            Training batches; there are some if the class says `needs_data`.
        generator : torch.Generator
            For all draws, so that the seed decides them.
        """

    @property
    def revision(self) -> int:
        """Counts how often what the pruner does with the same options has changed: it is part of the keys."""
        return 1

    def check_images(self, target: TargetType, images: int) -> None:
        """Raise `UserError` if so many training images are too few; by default, any number will do."""

    def sparse(self, target: TargetType) -> TrainingHooks:
        """Return how the stage ``sparse`` trains the network; by default as plainly as ``large`` is trained."""
        return TrainingHooks()

    def find_variant(self, variant: str, network: str) -> Variant:
        """Return what a published target means for a network.

        Raises
        ------
        UserError
            If there is no such variant of the network; names those there are.
        """
        where = f"pruner.variant={variant}: {self.options.name} has no"
        if not self.variants:
            raise UserError(f"{where} published targets")
        found = self.variants.get(network, {}).get(variant)
        if found is None:
            published = "; ".join(f"{name}: {', '.join(names)}" for name, names in self.variants.items())
            raise UserError(f"{where} such variant of {network}; there are {published}")
        return found


def check_scores(scores: object, sizes: Mapping[str, int]) -> None:
    """Check what a pruner's method `scores` returned; a user's pruner may return anything.

    Parameters
    ----------
    scores : object
        Has to map each name to a tensor with one finite number for each unit.
    sizes : mapping of str to int
        How many units are to be scored, by name.

    Raises
    ------
    UserError
        If it is not that.

    Examples
    --------
    >>> check_scores({"conv": torch.ones(3)}, {"conv": 8})
    Traceback (most recent call last):
    rethink_prune.errors.UserError: pruner: scores of conv must be a tensor of 8 finite numbers; its shape is (3,)
    """
    if not isinstance(scores, Mapping) or set(scores) != set(sizes):
        raise UserError(f"pruner: scores() must return a mapping with just these keys: {', '.join(sorted(sizes))}")
    for name, size in sizes.items():
        values = scores[name]
        if not isinstance(values, torch.Tensor):
            problem = f"it is a {type(values).__name__}"
        elif values.shape != (size,):
            problem = f"its shape is {tuple(values.shape)}"
        elif not torch.isfinite(values).all():
            problem = "it has some that are not finite"
        else:
            continue
        raise UserError(f"pruner: scores of {name} must be a tensor of {size} finite numbers; {problem}")
