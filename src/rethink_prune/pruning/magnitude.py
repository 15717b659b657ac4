"""Magnitude pruning of single weights (Han et al. 2015, *Learning both Weights and Connections*, arXiv:1506.02626).

Removes the weights of smallest absolute value of each convolution, the first one and projections included, and keeps
the network's shape; with ``linear=true`` linear layers take part. Biases and batch norms never do. `distribution` says
how many weights each layer keeps:

``global``
    All weights are ranked together: of ``n`` values ``|w|`` in ascending order, that at index ``int(n * ratio)`` is the
    threshold, and what is not above it goes.
``uniform``
    The same share goes from every layer, or a share for each.
``erk``
    Erdos-Renyi-Kernel (Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134): the share that a
    layer keeps is proportional to the sum of its weight's dimensions divided by their product. Layers that would keep
    more than all are left whole, and the others share the rest.
``lamp``
    Layer-adaptive magnitudes (Lee et al. 2021, arXiv:2010.07611) are ranked together: the square of a weight divided by
    the sum of the squares of its layer that are not smaller, itself included.

Han et al. set a threshold for each layer by hand; the paper ranks all weights together.

A mask holds removed weights at zero through momentum and weight decay (see `HeldMasks`). Only the others count as
parameters and MACs, so Scratch-B's length follows from the masked count. Scratch arms draw masked convolutions at a
density-scaled fan-out. A layer that a ranking would empty keeps its largest weight, and the report says so.

The masks follow from the trained weights, so all arms wait for the stage ``prune``.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from rethink_prune.config import Positive, Ratio, Share, TargetOptions
from rethink_prune.cost import Cost, layer_macs, weight_macs
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches, LayerWidth, Pruner, PruneReport, PruneResult, Target
from rethink_prune.pruning.selection import (
    Limits,
    PerLayer,
    describe_shortfall,
    describe_thin,
    matching_layers,
    wanted_cost,
    widths_for_global_ratio,
    widths_for_ratio,
)
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.cut import reshape


class MagnitudeOptions(TargetOptions):
    """How many weights go, of which layers; `skip` names layers to leave whole."""

    distribution: Literal["global", "uniform", "erk", "lamp"] = "global"
    linear: bool = False
    min_share: Share = 0.0
    ratio: Ratio = None
    target_macs: Positive | None = None
    target_params: Positive | None = None
    skip: tuple[str, ...] = ()

    def key(self) -> dict[str, Any]:
        """Return the options as stage keys have them: earlier versions called two of the distributions rankings."""
        earlier = {"global": "global", "uniform": "layer"}
        key = super().key()
        key.pop("distribution", None)
        return {**key, "ranking": earlier.get(self.distribution, self.distribution)}


class MagnitudeTarget(Target):
    """The layers whose weights may go; which ones, only the trained network tells.

    Parameters
    ----------
    options : MagnitudeOptions
    model, example
        See `Target`.
    network : str
        The network's name, for messages.
    """

    def __init__(self, options: MagnitudeOptions, model: nn.Module, example: torch.Tensor, network: str) -> None:
        super().__init__(model, example)
        self._options = options
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *((nn.Linear,) if options.linear else ()))
        parameters = dict(model.named_parameters())  # one that layers share is there once
        self._shapes_of_weights = {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, kinds) and f"{name}.weight" in parameters
        }
        self.layers = {name: math.prod(shape) for name, shape in self._shapes_of_weights.items()}
        if not self.layers:
            raise UserError(
                f"pruner.name={options.name}: finds no convolutions in {network}"
                + ("" if options.linear else "; pruner.linear=true prunes linear layers")
            )
        if options.distribution != "uniform" and isinstance(options.ratio, list | dict):
            raise UserError("pruner.ratio: one for each layer needs pruner.distribution=uniform")
        self._limits = Limits(min_share=options.min_share)
        # Finds patterns that match nothing, or everything, before any training.
        ratio = options.ratio if options.ratio is not None else 0.5
        self.check_removal(self._uniform(ratio))
        self._wanted = wanted_cost(options, self)
        if self._wanted is not None:
            self._wanted.check_reach(self._cost_of(self._uniform(1 - 1e-12)))

    @property
    def known(self) -> bool:
        """False: the masks follow from trained weights."""
        return False

    def architecture(self) -> Architecture:
        """Return the unpruned architecture."""
        return Architecture()

    def report(self, counts: Mapping[str, int] | None = None, warnings: tuple[str, ...] = ()) -> PruneReport:
        """Return how many weights each layer keeps: all of them without `counts`."""
        kept = counts or self.layers
        layers = tuple(LayerWidth(name, kept[name], size) for name, size in self.layers.items())
        return PruneReport(layers, warnings=warnings)

    def check_removal(self, counts: Mapping[str, int]) -> None:
        """Raise `UserError` if these counts are those of the unpruned network."""
        if counts == self.layers:
            option = self._options.target_option
            raise UserError(f"pruner.{option}: removes no weight (with pruner.skip and min_share as they are)")

    def counts(self, magnitudes: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], list[str]]:
        """Return how many weights each layer keeps, and what should be said about it."""
        options, limits = self._options, self._limits
        together = options.distribution in ("global", "lamp")
        scores = magnitudes
        if options.distribution == "lamp":
            scores = {name: lamp_scores(values) for name, values in magnitudes.items()}

        def distribute(ratio: PerLayer) -> tuple[dict[str, int], list[str]]:
            if options.distribution == "uniform":
                return self._uniform(ratio), []
            assert isinstance(ratio, float)
            if options.distribution == "erk":
                return self._erk(ratio), []
            return widths_for_global_ratio(ratio, scores, skip=options.skip, limits=limits)

        if self._wanted is None:
            assert options.ratio is not None
            counts, emptied = distribute(options.ratio)
        else:
            counts = self._wanted.find_widths(lambda ratio: distribute(ratio)[0], self._cost_of)
            emptied = [name for name, count in counts.items() if count == 1 < self.layers[name]]
        short = describe_shortfall(options.ratio, counts, self.layers, skip=options.skip, limits=limits)
        if not together:
            return counts, short
        stay = {name: "weight stays" if counts[name] == 1 else f"{counts[name]} weights stay" for name in emptied}
        said = [f"{name}: the threshold would have emptied it; its largest {what}" for name, what in stay.items()]
        return counts, [*said, *describe_thin(counts, self.layers), *short]

    def _uniform(self, ratio: PerLayer) -> dict[str, int]:
        return widths_for_ratio(ratio, self.layers, skip=self._options.skip, limits=self._limits)

    def _erk(self, ratio: float) -> dict[str, int]:
        skipped = matching_layers("skip", self._options.skip, self.layers)
        shapes = {name: shape for name, shape in self._shapes_of_weights.items() if name not in skipped}
        densities = erk_densities(shapes, 1 - ratio)
        return {
            name: self._limits.apply(int(size * densities.get(name, 1.0) + 1e-9), size)
            for name, size in self.layers.items()
        }

    @cached_property
    def _weight_macs(self) -> dict[str, int]:
        return weight_macs(self.shapes, layer_macs(self.shapes, self.input_shape))

    def _cost_of(self, counts: Mapping[str, int]) -> Cost:
        # From the numbers of weights alone: which ones go is not chosen yet.
        gone = {name: size - counts[name] for name, size in self.layers.items()}
        macs_gone = sum(self._weight_macs[f"{name}.weight"] * gone[name] // self.layers[name] for name in gone)
        return Cost(self.full_cost.params - sum(gone.values()), self.full_cost.macs - macs_gone)


class Magnitude(Pruner[MagnitudeOptions, MagnitudeTarget]):
    """Masks the weights of smallest magnitude.

    :source: Han et al. 2015
    :goes: single weights
    :by: absolute value, ranked over all layers or in each (`distribution`); masks
    """

    name = "magnitude"
    position = 6
    options_type = MagnitudeOptions

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> MagnitudeTarget:
        """Apply the options to a network."""
        return MagnitudeTarget(self.options, model, example, network or type(model).__name__)

    def prune(
        self, model: nn.Module, target: MagnitudeTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Return a copy of `model` with masked weights set to zero."""
        magnitudes = {name: model.get_parameter(f"{name}.weight").detach().abs().flatten() for name in target.layers}
        # A threshold among values that are not numbers would mean nothing.
        for name, values in magnitudes.items():
            if not torch.isfinite(values).all():
                raise UserError(f"pruner: {name} has weights that are not finite")
        counts, warnings = target.counts(magnitudes)
        target.check_removal(counts)
        masks = {}
        for name, values in magnitudes.items():
            # Layers that lose nothing have a mask as well: scratch arms draw all convolutions by one rule.
            mask = torch.zeros(len(values), dtype=torch.bool)
            # Stable, so that the choice among equal weights is the same on every machine.
            mask[torch.sort(values, descending=True, stable=True).indices[: counts[name]].cpu()] = True
            masks[f"{name}.weight"] = mask.view(model.get_parameter(f"{name}.weight").shape)
        # A copy: with nothing to cut, reshape changes no shape.
        pruned = reshape(model, Architecture())
        apply_masks(pruned, masks)
        return PruneResult(pruned, Architecture(masks=masks), target.report(counts, tuple(warnings)))


def lamp_scores(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the layer-adaptive magnitudes of a layer's weights (Lee et al. 2021), in float64.

    Examples
    --------
    >>> lamp_scores(torch.tensor([1.0, 3.0, 2.0])).mul(14).round().tolist()  # 1/14, 9/9 and 4/13
    [1.0, 14.0, 4.0]
    """
    # Stable, so that the order of equal weights is the same on every machine.
    ordered, order = torch.sort(magnitudes.double().square(), descending=True, stable=True)
    scores = torch.empty_like(ordered)
    # Of a layer of zeros, all sums are zero: nothing is worth keeping.
    scores[order] = (ordered / ordered.cumsum(0)).nan_to_num(nan=0.0)
    return scores


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return the share of weights that each layer keeps by the Erdos-Renyi-Kernel rule (Evci et al. 2020).

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        The shape of each layer's weight.
    density : float
        Share of all weights that stay.

    Examples
    --------
    >>> shapes = {"conv": (8, 3, 3, 3), "wide": (64, 64, 3, 3)}  # 17 / 216 and 134 / 36864
    >>> {name: round(share, 4) for name, share in erk_densities(shapes, 0.1).items()}
    {'conv': 1.0, 'wide': 0.0947}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = density * sum(sizes.values())
    whole: set[str] = set()
    while True:
        shared = {name: sum(shape) for name, shape in shapes.items() if name not in whole}
        # The density is `scale * sum / product`, so the number of weights is `scale * sum`.
        left = wanted - sum(sizes[name] for name in whole)
        scale = left / sum(shared.values()) if shared else 0.0
        full = {name for name, dimensions in shared.items() if scale * dimensions >= sizes[name]}
        if not full:
            return {name: 1.0 if name in whole else scale * shared[name] / sizes[name] for name in shapes}
        whole |= full
