"""Guided pruning (Liu et al. 2019, *Rethinking the Value of Network Pruning*, arXiv:1810.05270, section 5).

Builds an architecture from the average pattern of other studies' pruned networks. A *layer stage* is the layers at one
spatial size. Of each, the sources say what share of its channels is kept: averaged over its layers, then over the
sources. A layer with N channels gets ::

    width = min(N, size * share * N),    rounded, at least 1

so layers that were equally wide get a constant width in each layer stage. Stages are matched by their order, so the
sources may be of another network and of other images (*transferred*), as long as there are as many stages.

If the sources have lost single weights, the average is that of each position of the k x k kernels: the share of a
layer's kernels that keep it (*guided sparsifying*). Layers whose kernels have another size keep to themselves. By
``pruner.pattern``:

``sample``
    Each position is kept in ``size * share`` of the layer's kernels, at most in all; the seed draws which ones. The
    default: the average is a share at each position, and this keeps it at each.
``top``
    The layer keeps as many weights as the shares add up to, and fills the positions in the order of their shares: whole
    positions, and of the last one as many kernels as are left, drawn by the seed. It makes kernels alike, which no
    source is.

No publication says how averages are rounded: ``pruner.rounding=floor``, the default, is what every ratio here and the
published widths of filter pruning do, so sizes compare with those of ``uniform``; ``nearest`` is closer to the average.

Instead of `size`, a target of MACs or parameters can be given: bisection finds the one factor for all layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator
from torch import nn

from rethink_prune.config import ChannelOptions, Positive
from rethink_prune.cost import Cost, output_sizes
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.pruning.fresh import FreshChannels, FreshPruner, FreshWeightOptions, FreshWeights, weight_options
from rethink_prune.pruning.pruner import Target
from rethink_prune.pruning.selection import WantedCost, matching_layers, wanted_cost
from rethink_prune.pruning.sources import (
    Averages,
    Layer,
    Source,
    SourceReader,
    average,
    layer_size,
    ordered_positions,
)
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import ChannelGroup

Rounding = Literal["floor", "nearest"]


def _check_sources(sources: object) -> object:
    """Return the sources as a list; raise ValueError if there are none."""
    if isinstance(sources, str) and sources != "???":
        return [sources]
    if not isinstance(sources, list | tuple) or not sources:
        raise ValueError("must name pruned networks: [store/stages/prune-...], runs, or the results.json of a report")
    return sources


class GuidedOptions(ChannelOptions):
    """Which networks to follow, how closely, and how large to become."""

    example_target: ClassVar[str] = "size=1"
    ranking: Literal["layer"] = "layer"
    sources: Annotated[tuple[str, ...], BeforeValidator(_check_sources)]
    size: Positive | None = None
    match: Literal["stage", "layer"] = "stage"
    rounding: Rounding = "floor"
    pattern: Literal["sample", "top"] = "sample"

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """Return what may state the target: the sources decide what a ratio or widths would."""
        return "size", "target_macs", "target_params"


class Guided(FreshPruner[GuidedOptions]):
    """Leaves what other studies' pruned networks keep on average.

    :source: Liu et al. 2019
    :goes: channels, or single weights, as of the `sources`; before any training
    :by: the average over the layers of one spatial size, with new weights alone
    """

    name = "guided"
    options_type = GuidedOptions

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> Target:
        """Apply the sources' average to a network.

        Raises
        ------
        UserError
            If a source cannot be used, or the average does not fit the network.
        """
        name, options = network or type(model).__name__, self.options
        sources = SourceReader(name, model).read(options.sources)
        other = next((source for source in sources if source.network != name), None)
        if options.match == "layer" and other is not None:
            raise UserError(
                f"pruner.match=layer: {other.where} is of {other.network}, and this study of {name}; take sources of "
                f"{name}, or pruner.match=stage"
            )
        averages = average(sources, by_stage=options.match == "stage")
        if not sources[0].masked:
            return ChannelTarget(_AverageWidths(options, sources, averages), model, example, name)
        taken = weight_options(options, linear=any(source.linear for source in sources), unused=("min_share",))
        return _AveragePattern(taken, model, example, name, self.seed, averages, options)


class _AverageWidths(FreshChannels[GuidedOptions]):
    """The widths that the sources' average gives."""

    def __init__(self, options: GuidedOptions, sources: Sequence[Source], averages: Averages) -> None:
        super().__init__(options)
        self._averages = averages
        self._kinds = {"conv", "selection"}
        self._kinds |= {"linear"} if any(source.linear for source in sources) else set()
        # Where streams are pruned by what reads them, other channels are free than elsewhere.
        self.selecting = next((source.selecting for source in sources if source.selecting), None)

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether the sources say anything about groups of this kind."""
        return group.kind in self._kinds

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The averages that follow from the sources."""
        return {"sources": self._averages.plain()}

    def find_widths(self, target: ChannelTarget) -> dict[str, int]:
        """Return the average widths, times the size."""
        sizes = output_sizes(target.shapes, target.input_shape)
        layers = [Layer(group.name, layer_size(sizes, group.name), group.size) for group in target.groups]
        shares = {name: float(share) for name, share in self._averages.of(layers, target.network).items()}
        skipped = matching_layers("skip", self.options.skip, target.sizes)

        def widths_at(size: float) -> dict[str, int]:
            return {
                name: full
                if name in skipped
                else target.limits.apply(average_width(size * shares[name], full, self.options.rounding), full)
                for name, full in target.sizes.items()
            }

        if self.options.size is not None:
            return widths_at(self.options.size)
        assert target.wanted is not None
        largest = max(share * target.sizes[name] for name, share in shares.items())
        return _find_size(target.wanted, widths_at, target.cost_at, 1 / largest, 1 / min(shares.values()))


class _AveragePattern(FreshWeights):
    """Masks by the sources' average pattern of kernel positions."""

    def __init__(
        self,
        options: FreshWeightOptions,
        model: nn.Module,
        example: torch.Tensor,
        network: str,
        seed: int,
        averages: Averages,
        guided: GuidedOptions,
    ) -> None:
        self._averages, self._guided, self._network = averages, guided, network
        super().__init__(options, model, example, network, seed)

    def resolved(self) -> Mapping[str, Any]:
        """Return the averages that follow from the sources."""
        return {"sources": self._averages.plain()}

    def architecture(self) -> Architecture:
        """Return masks that keep so many kernels at each position, drawn at random."""
        masks, generator = {}, self.generator
        for name, counts in self._by_position.items():
            shape = self._shapes_of_weights[name]
            mask = torch.zeros(math.prod(shape[:2]), len(counts), dtype=torch.bool)
            # All are drawn, so that a larger network of the same seed keeps what a smaller one keeps.
            for position, count in enumerate(counts):
                order = torch.randperm(len(mask), generator=generator)
                mask[order[:count], position] = True
            masks[f"{name}.weight"] = mask.view(shape)
        return Architecture(masks=masks)

    def _count(self) -> dict[str, int]:
        sizes = output_sizes(self.shapes, self.input_shape)
        shapes = self._shapes_of_weights
        layers = [
            Layer(name, math.prod(sizes[name]), full, tuple(shapes[name][2:])) for name, full in self.layers.items()
        ]
        shares = self._averages.of(layers, self._network)
        skipped = matching_layers("skip", self._guided.skip, self.layers)

        # One entry for each position of a layer: a search for a size takes each as if it were a layer.
        def entries_at(size: float) -> dict[str, int]:
            found: dict[str, int] = {}
            for name, share in shares.items():
                kernels = math.prod(shapes[name][:2])
                rounding, pattern = self._guided.rounding, self._guided.pattern
                counts = position_counts(share, kernels, size, rounding=rounding, pattern=pattern)
                counts = [kernels] * len(counts) if name in skipped else counts
                found |= {f"{name}@{position}": count for position, count in enumerate(counts)}
            return found

        def by_layer(entries: Mapping[str, int]) -> dict[str, list[int]]:
            values = iter(entries.values())
            return {name: list(islice(values, share.numel())) for name, share in shares.items()}

        def cost_of(entries: Mapping[str, int]) -> Cost:
            return self._cost_of({name: sum(counts) for name, counts in by_layer(entries).items()})

        wanted = wanted_cost(self._guided, self)
        if wanted is None:
            assert self._guided.size is not None
            entries = entries_at(self._guided.size)
        else:
            smallest = min(1 / self.layers[name] for name in shares)
            largest = 1 / min(float(share[share > 0].min()) for share in shares.values())
            entries = _find_size(wanted, entries_at, cost_of, smallest, largest)
        self._by_position = by_layer(entries)
        return {name: sum(counts) for name, counts in self._by_position.items()}


def rounded(value: float, rounding: Rounding) -> int:
    """Return a whole number: rounded down, or to the nearest, halves up.

    Examples
    --------
    >>> rounded(2.5, "floor"), rounded(2.5, "nearest"), rounded(0.1 * 30, "floor")
    (2, 3, 3)
    """
    # The constant undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    return int(value + (0.5 if rounding == "nearest" else 0) + 1e-9)


def average_width(share: float, full: int, rounding: Rounding) -> int:
    """Return the width of a layer that keeps a share of its `full` channels: from 1 to all.

    Examples
    --------
    >>> average_width(0.3, 64, "floor"), average_width(0.3, 64, "nearest"), average_width(1.5, 64, "floor")
    (19, 19, 64)
    """
    return min(full, max(1, rounded(share * full, rounding)))


def position_counts(
    shares: torch.Tensor, kernels: int, size: float, *, rounding: Rounding, pattern: Literal["sample", "top"]
) -> list[int]:
    """Return in how many kernels of a layer each position is kept: at least one weight in all.

    Parameters
    ----------
    shares : torch.Tensor
        The share of kernels that keep each position, in the shape of a kernel.
    kernels : int
        How many kernels the layer has.
    size : float
        Multiplies the shares; none becomes more than 1.
    rounding : {"floor", "nearest"}
    pattern : {"sample", "top"}
        See the top of this file.

    Examples
    --------
    >>> shares = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    >>> position_counts(shares, 10, 1.0, rounding="floor", pattern="sample")
    [2, 8, 6, 4]
    >>> position_counts(shares, 10, 1.0, rounding="floor", pattern="top")
    [0, 10, 10, 0]
    """
    wanted = [min(1.0, size * share) for share in shares.double().flatten().tolist()]
    if pattern == "sample":
        counts = [rounded(share * kernels, rounding) for share in wanted]
    else:
        counts, left = [0] * len(wanted), rounded(sum(wanted) * kernels, rounding)
        for place in ordered_positions(shares):
            counts[place] = min(kernels, left)
            left -= counts[place]
    if not any(counts):
        counts[next(ordered_positions(shares))] = 1
    return counts


def _find_size(
    wanted: WantedCost,
    widths_at: Callable[[float], dict[str, int]],
    cost_of: Callable[[Mapping[str, int]], Cost],
    smallest: float,
    largest: float,
) -> dict[str, int]:
    """Return the widths of the size at which the network has the wanted cost; the two sizes enclose it."""
    # By equal factors: shares may differ a hundredfold, so equal steps would be coarse at the small end.
    return wanted.find_widths(lambda ratio: widths_at(largest * (smallest / largest) ** ratio), cost_of)
