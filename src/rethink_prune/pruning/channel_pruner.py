"""Pruners that score channels: the pruner scores, the analysis groups, surgery cuts."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from rethink_prune.pruning.channel_target import ChannelTarget, Channelwise, Options
from rethink_prune.pruning.pruner import Batches, PruneResult
from rethink_prune.surgery.channels import ChannelGroup
from rethink_prune.surgery.plan import Positions

Groups = Sequence[ChannelGroup]
Scores = Mapping[str, torch.Tensor]


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
