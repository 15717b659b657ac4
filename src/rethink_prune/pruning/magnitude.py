"""Magnitude pruning of single weights (Han et al. 2015, *Learning both Weights and Connections*, arXiv:1506.02626).

Removes the weights of smallest absolute value and keeps the network's shape. All weights of all convolutions, the
first one and projections included, are ranked together: of ``n`` values ``|w|`` in ascending order, that at index
``int(n * ratio)`` is the threshold, and what is not above it goes. ``ranking=layer`` removes the same share from every
layer instead; with ``linear=true`` linear layers take part. Biases and batch norms never do.

A mask holds removed weights at zero through momentum and weight decay (see `HeldMasks`). Only the others count as
parameters and MACs, so Scratch-B's length follows from the masked count. Scratch arms draw masked convolutions at a
density-scaled fan-out. A layer that the threshold would empty keeps its largest weight, and the report says so.

The masks follow from the trained weights, so all arms wait for the stage ``prune``.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from rethink_prune.config import Positive, Ratio, TargetOptions
from rethink_prune.cost import Cost, layer_macs, weight_macs
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches, LayerWidth, Pruner, PruneReport, PruneResult, Target
from rethink_prune.pruning.selection import PerLayer, wanted_cost, widths_for_global_ratio, widths_for_ratio
from rethink_prune.surgery.architecture import Architecture, apply_masks
from rethink_prune.surgery.cut import reshape


class MagnitudeOptions(TargetOptions):
    """How many weights go; `skip` names layers to leave whole."""

    ranking: Literal["global", "layer"] = "global"
    linear: bool = False
    ratio: Ratio = None
    target_macs: Positive | None = None
    target_params: Positive | None = None
    skip: tuple[str, ...] = ()


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
        self.layers = {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, kinds) and f"{name}.weight" in parameters
        }
        if not self.layers:
            raise UserError(
                f"pruner.name={options.name}: finds no convolutions in {network}"
                + ("" if options.linear else "; pruner.linear=true prunes linear layers")
            )
        if options.ranking == "global" and isinstance(options.ratio, list | dict):
            raise UserError("pruner.ratio: one for each layer needs pruner.ranking=layer")
        # Finds patterns that match nothing, or everything, before any training.
        ratio = options.ratio if options.ratio is not None else 0.5
        self.check_removal(widths_for_ratio(ratio, self.layers, skip=options.skip))
        self._wanted = wanted_cost(options, self)
        if self._wanted is not None:
            narrowest = widths_for_ratio(1 - 1e-12, self.layers, skip=options.skip)
            self._wanted.check_reach(self._cost_of(narrowest))

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
            raise UserError(f"pruner.{self._options.target_option}: removes no weight (with pruner.skip as it is)")

    def counts(self, magnitudes: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], list[str]]:
        """Return how many weights each layer keeps, and the layers that keep one only for being emptied otherwise."""
        options = self._options

        def rank(ratio: PerLayer) -> tuple[dict[str, int], list[str]]:
            if options.ranking == "layer":
                return widths_for_ratio(ratio, self.layers, skip=options.skip), []
            assert isinstance(ratio, float)
            return widths_for_global_ratio(ratio, magnitudes, skip=options.skip)

        if self._wanted is None:
            assert options.ratio is not None
            return rank(options.ratio)
        counts = self._wanted.find_widths(lambda ratio: rank(ratio)[0], self._cost_of)
        return counts, [name for name, count in counts.items() if count == 1 < self.layers[name]]

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
    :by: absolute value, ranked over all layers; masks
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
        counts, emptied = target.counts(magnitudes)
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
        warnings = tuple(f"{name}: the threshold would have emptied it; its largest weight stays" for name in emptied)
        return PruneResult(pruned, Architecture(masks=masks), target.report(counts, warnings))
