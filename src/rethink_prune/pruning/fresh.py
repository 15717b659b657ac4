"""Pruners that decide an architecture alone: they look at no weights, so it is known before any training.

What remains of a network has no weights worth inheriting: arms that need some are refused. Which channels remain does
not matter then, so those of highest index go. Which single weights remain does: their positions follow from the seed.
"""

from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, Positive, Ratio
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget, Channelwise
from rethink_prune.pruning.pruner import Batches, Pruner, PruneReport, PruneResult, Target
from rethink_prune.pruning.weight_pruner import WeightOptions, WeightTarget
from rethink_prune.seeds import derive_generator
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.cut import reshape

Options = TypeVar("Options", bound=ChannelOptions)


class FreshPruner(Pruner[Options, Target]):
    """Base of the pruners that decide an architecture alone."""

    fresh_only: ClassVar[bool] = True
    no_rounds: ClassVar[str] = "it decides an architecture before any training, so nothing is trained in between"

    def prune(self, model: nn.Module, target: Target, *, data: Batches, generator: torch.Generator) -> PruneResult:
        """Return a copy of `model` with that architecture; of its weights, what remains is kept."""
        return _leave_known(model, target)


class FreshChannels(Channelwise[Options]):
    """What a `ChannelTarget` asks about channels: those of `slimming`, with widths that the options decide.

    Inputs of pre-activation and dense blocks are among them, so that architectures that slimming finds have uniform
    ones to compare with.
    """

    selecting: Literal["norm", "conv"] | None = "norm"

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Return a copy of `model` with these widths."""
        return _leave_known(model, target)


def _leave_known(model: nn.Module, target: Target) -> PruneResult:
    architecture = target.known_architecture
    pruned = reshape(model, architecture)
    apply_masks(pruned, architecture.masks)
    return PruneResult(pruned, architecture, target.report())


class FreshWeightOptions(WeightOptions):
    """How many single weights go, as a `ratio` for all layers or for each, or as a `size`."""

    ratio: Ratio = None  # type: ignore[assignment]  # also one for each layer
    size: Positive | None = None


def weight_options(
    options: ChannelOptions, *, linear: bool = False, unused: tuple[str, ...] = ()
) -> FreshWeightOptions:
    """Return the options that single weights take.

    Parameters
    ----------
    options : ChannelOptions
    linear : bool
        Whether linear layers take part.
    unused : tuple of str
        Further options that are of no use here.

    Raises
    ------
    UserError
        If another option is given.

    Examples
    --------
    >>> weight_options(ChannelOptions(name="uniform", ratio=0.5)).ratio
    0.5
    >>> weight_options(ChannelOptions(name="uniform", ratio=0.5, round_to=8))
    Traceback (most recent call last):
    rethink_prune.errors.UserError: pruner.round_to=8: of no use with single weights
    """
    fields = type(options).model_fields
    for name in ("variant", "widths", "scope", "min_channels", "round_to", *unused):
        if getattr(options, name) != fields[name].default:
            raise UserError(f"pruner.{name}={getattr(options, name)}: of no use with single weights")
    taken: dict[str, Any] = {name: getattr(options, name) for name in ("name", "ratio", "skip", "min_share")}
    taken |= {name: getattr(options, name) for name in ("target_macs", "target_params")}
    return FreshWeightOptions(**taken, size=getattr(options, "size", None), linear=linear)


class FreshWeights(WeightTarget):
    """Masks that are known before any training: the same share of every layer, at positions drawn by the seed.

    Of two sizes with one seed, the larger one keeps what the smaller one keeps.

    Parameters
    ----------
    options : FreshWeightOptions
    model, example, network
        See `WeightTarget`.
    seed : int
        Decides the positions.
    """

    def __init__(
        self, options: FreshWeightOptions, model: nn.Module, example: torch.Tensor, network: str, seed: int
    ) -> None:
        super().__init__(options, model, example, network, distribution="uniform")
        self._seed = seed
        self.kept = self._count()
        self.check_removal(self.kept)

    @property
    def known(self) -> bool:
        """True: nothing has to be trained."""
        return True

    @property
    def generator(self) -> torch.Generator:
        """What draws the positions, always from its start."""
        return derive_generator(self._seed, "positions")

    def architecture(self) -> Architecture:
        """Return masks at positions drawn at random."""
        return self.reshuffled(self.report().layers, self.generator)

    def report(self, counts: Any = None, warnings: tuple[str, ...] = ()) -> PruneReport:
        """Return how many weights each layer keeps."""
        return super().report(counts or self.kept, warnings)

    def _count(self) -> dict[str, int]:
        """Return how many weights each layer keeps."""
        return self.counts({})[0]
