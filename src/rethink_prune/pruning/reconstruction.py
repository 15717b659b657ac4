"""Pruners that go from layer to layer: choose channels by images, then repair the layers that read them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, Count
from rethink_prune.pruning.channel_target import ChannelTarget, Channelwise, Choice
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.pruning.samples import FirstImages
from rethink_prune.pruning.working_copy import ChannelReader, WorkingCopy
from rethink_prune.surgery.channels import ChannelGroup


class ReconstructionOptions(ChannelOptions):
    """Options of a channel pruner that samples images; it goes layer by layer, so it has no global ranking."""

    ranking: Literal["layer"] = "layer"
    images: Count = 1000


@dataclass(frozen=True)
class Reconstruction:
    """One network on its way to fewer channels: the copy that is pruned, and what its layers are sampled with."""

    model: nn.Module
    current: WorkingCopy
    images: FirstImages
    generator: torch.Generator

    @cached_property
    def original(self) -> WorkingCopy:
        """A copy that stays as it is; made where it is asked for, because it takes memory."""
        return WorkingCopy(self.model, self.images.device)


AnyReconstructionOptions = TypeVar("AnyReconstructionOptions", bound=ReconstructionOptions)


class ReconstructionPruner(Channelwise[AnyReconstructionOptions]):
    """Removes channels layer by layer, and repairs what reads them; a subclass defines :meth:`rewrite_readers`."""

    needs_data = True

    @abstractmethod
    def rewrite_readers(
        self, run: Reconstruction, group: ChannelGroup, width: int, readers: Sequence[ChannelReader]
    ) -> list[int]:
        """Choose the units of a group to drop, and rewrite the weights of its readers for the units that stay.

        Parameters
        ----------
        run : Reconstruction
            The weights of ``run.current`` are rewritten.
        group : ChannelGroup
        width : int
            How many units stay.
        readers : sequence of ChannelReader
            The layers that read the group's channels.

        Returns
        -------
        list of int
            The units to drop, in ascending order.
        """

    def prune(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Go through the layers, then cut.

        Raises
        ------
        UserError
            If there are too few images, or if weights or activations are not finite.
        """
        reconstructed, drop = self.reconstruct(model, target, data=data, generator=generator)
        return target.cut(reconstructed, Choice(drop))

    def reconstruct(
        self, model: nn.Module, target: ChannelTarget, *, data: Batches, generator: torch.Generator
    ) -> tuple[nn.Module, dict[str, list[int]]]:
        """Return a copy of `model` at full width with rewritten weights, and the units to drop of each group."""
        images = FirstImages(data, self.options.images, target.input_shape)
        run = Reconstruction(model, WorkingCopy(model, images.device), images, generator)
        drop: dict[str, list[int]] = {}
        for group, width in target.narrowed():
            readers = run.current.readers(target.channels, group)
            drop[group.name] = self.rewrite_readers(run, group, width, readers)
            # Masked at once: the next layer is sampled through what is left.
            run.current.remove(group, drop[group.name], readers)
        return run.current.rewritten(model), drop

    def limit_on_images(self, available: int) -> str:
        """Return what keeps the sample from having more images, for error messages."""
        return "pruner.images" if available >= self.options.images else "the number of training images"
