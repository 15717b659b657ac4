"""Pruners of single weights: the target says how many weights each layer keeps, the pruner scores them.

Weights of convolutions take part, the first one and projections included, and those of linear layers that read tokens:
more than one vector per image. With ``linear=true`` all linear layers do. The input projections in the parameters of
`nn.MultiheadAttention` are such a layer as well, ``NAME.in_proj``. Biases, norms, position embeddings and class tokens
never take part. The network keeps its shape: a mask holds removed weights at zero through
momentum and weight decay (see `HeldMasks`). Only the others count as parameters and MACs, so Scratch-B's length follows
from the masked count. Scratch arms draw masked convolutions at a density-scaled fan-out.

All weights are ranked together: of ``n`` scores in ascending order, that at index ``int(n * ratio)`` is the threshold,
and what is not above it goes. A layer that a ranking would empty keeps its best weight, and the report says so.

Of a network that was pruned before, only the weights that remain take part: the ratio, the ranking and the sizes are
theirs, and a weight that is gone stays gone. A cost target is that of the whole network all the same.

The masks follow from the weights, so all arms wait for the stage ``prune``.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BeforeValidator
from torch import nn

from rethink_prune.config import Positive, Share, TargetOptions, check_ratio
from rethink_prune.cost import Cost, input_projections, layer_macs, weight_macs
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches, LayerWidth, Pruner, PruneReport, PruneResult, Target, check_scores
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
from rethink_prune.surgery.architecture import Architecture, Masks, apply_masks
from rethink_prune.surgery.cut import reshape

# How the weights that stay are distributed over the layers.
Distribution = Literal["global", "uniform", "erk"]
WeightScores = Mapping[str, torch.Tensor]


class WeightOptions(TargetOptions):
    """How many weights go, of which layers; `skip` names layers to leave whole."""

    linear: bool = False
    min_share: Share = 0.0
    ratio: Annotated[float | None, BeforeValidator(check_ratio)] = None
    target_macs: Positive | None = None
    target_params: Positive | None = None
    skip: tuple[str, ...] = ()


class WeightTarget(Target):
    """The layers whose weights may go; which ones, only the network tells.

    Parameters
    ----------
    options : WeightOptions
    model, example
        See `Target`.
    network : str
        The network's name, for messages.
    distribution : {"global", "uniform", "erk"}
        How the weights that stay are distributed over the layers; see `magnitude`.
    masks : mapping of str to torch.Tensor
        By parameter name, True where a weight remains, of a network that was pruned before; parameters without one are
        whole.

    Attributes
    ----------
    layers : mapping of str to int
        How many weights of each layer remain before this target prunes: all of them without `masks`.
    parameters : mapping of str to str
        The name of each layer's weight in the network.
    masks : mapping of str to torch.Tensor
        As given.

    Raises
    ------
    UserError
        If the options or the masks do not fit the network.
    """

    def __init__(
        self,
        options: WeightOptions,
        model: nn.Module,
        example: torch.Tensor,
        network: str,
        *,
        distribution: Distribution = "global",
        masks: Masks = {},  # noqa: B006 (read only)
    ) -> None:
        super().__init__(model, example)
        self._options, self._distribution, self.masks = options, distribution, masks
        parameters = dict(model.named_parameters())  # one that layers share is there once
        for name, mask in masks.items():
            if name not in parameters or mask.shape != parameters[name].shape:
                raise UserError(f"pruner.name={options.name}: the mask of {name} fits no parameter of {network}")
        taking_part = {
            layer: weight
            for layer, weight, is_conv in _weights_of_layers(model)
            if weight in parameters and (is_conv or options.linear or layer in self._token_layers)
        }
        self.parameters: Mapping[str, str] = taking_part
        self._shapes_of_weights = {name: tuple(parameters[weight].shape) for name, weight in taking_part.items()}
        self._full = {name: math.prod(shape) for name, shape in self._shapes_of_weights.items()}
        self.layers = {
            name: int(masks[weight].sum()) if (weight := taking_part[name]) in masks else size
            for name, size in self._full.items()
        }
        if not self.layers:
            raise UserError(
                f"pruner.name={options.name}: finds no convolutions in {network}"
                + ("" if options.linear else "; pruner.linear=true prunes linear layers")
            )
        if distribution != "uniform" and isinstance(options.ratio, list | dict):
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
        """False: the masks follow from the weights."""
        return False

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weight of each of `layers` in this network or a copy of it."""
        return {name: model.get_parameter(weight) for name, weight in self.parameters.items()}

    def resolved(self) -> Mapping[str, Any]:
        """Return whether layers take part that came later: those that read tokens, unasked, and parts of attention."""
        unasked = not self._options.linear and any(name in self._token_layers for name in self.layers)
        in_attention = any(weight.endswith("_proj_weight") for weight in self.parameters.values())
        return {"tokens": True} if unasked or in_attention else {}

    def architecture(self) -> Architecture:
        """Return the architecture before this target prunes."""
        return Architecture(masks=self.masks)

    def reshuffled(self, layers: Sequence[LayerWidth], generator: torch.Generator) -> Architecture:
        """Return masks with the same number of weights in each layer, at random positions.

        They are drawn from all positions, those that an earlier pruning took included: which ones it took, a trained
        network decided.
        """
        masks = dict(self.masks)
        for layer in layers:
            order = torch.randperm(self._full[layer.layer], generator=generator)
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[: layer.kept]] = True
            masks[self.parameters[layer.layer]] = mask.view(self._shapes_of_weights[layer.layer])
        return Architecture(masks=masks)

    def report(self, counts: Mapping[str, int] | None = None, warnings: tuple[str, ...] = ()) -> PruneReport:
        """Return how many weights each layer keeps: all of them without `counts`."""
        kept = counts or self.layers
        layers = tuple(LayerWidth(name, kept[name], size) for name, size in self.layers.items())
        return PruneReport(layers, warnings=warnings)

    def check_removal(self, counts: Mapping[str, int]) -> None:
        """Raise `UserError` if these counts are those of the network as it is."""
        if counts == self.layers:
            option = self._options.target_option
            raise UserError(f"pruner.{option}: removes no weight (with pruner.skip and min_share as they are)")

    def remaining(self, scores: WeightScores) -> dict[str, torch.Tensor]:
        """Return the scores of the weights that remain before this target prunes.

        Parameters
        ----------
        scores : mapping of str to torch.Tensor
            For each of `layers`, one number for each of its weights, flattened.
        """
        gone = {name: self.masks.get(weight) for name, weight in self.parameters.items()}
        return {n: s if (mask := gone[n]) is None else s[mask.flatten().to(s.device)] for n, s in scores.items()}

    def counts(self, scores: WeightScores, *, progress: float = 1.0) -> tuple[dict[str, int], list[str]]:
        """Return how many weights each layer keeps, and what should be said about it.

        Parameters
        ----------
        scores : mapping of str to torch.Tensor
            Of the weights that remain, as `remaining` returns them.
        progress : float
            In (0, 1]: below 1, what they keep on the way there. What stays, or the cost that a target states, falls by
            equal factors.
        """
        options, limits, sizes = self._options, self._limits, self.layers

        def distribute(ratio: PerLayer) -> tuple[dict[str, int], list[str]]:
            if self._distribution == "uniform":
                return self._uniform(ratio), []
            assert isinstance(ratio, float)
            if self._distribution == "erk":
                return self._erk(ratio), []
            return widths_for_global_ratio(ratio, scores, skip=options.skip, limits=limits)

        if self._wanted is None:
            assert options.ratio is not None
            ratio = options.ratio
            if progress < 1:
                ratio = 1 - (1 - ratio) ** progress
            counts, emptied = distribute(ratio)
        else:
            wanted = self._wanted.on_the_way(progress)
            counts = wanted.find_widths(lambda ratio: distribute(ratio)[0], self._cost_of, strict=progress == 1)
            emptied = [name for name, count in counts.items() if count == 1 < sizes[name]]
        short = describe_shortfall(options.ratio, counts, sizes, skip=options.skip, limits=limits)
        if self._distribution != "global":
            return counts, short
        stay = {name: "weight stays" if counts[name] == 1 else f"{counts[name]} weights stay" for name in emptied}
        said = [f"{name}: the threshold would have emptied it; its best {what}" for name, what in stay.items()]
        return counts, [*said, *describe_thin(counts, sizes), *short]

    def choose(self, scores: WeightScores, counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Return a mask for each layer: True for so many weights, those of the highest scores that remain.

        Parameters
        ----------
        scores : mapping of str to torch.Tensor
            For each of `layers`, one number for each of its weights, flattened.
        counts : mapping of str to int
        """
        masks = {}
        for name, values in self.remaining(scores).items():
            # Stable, so that the choice among equal weights is the same on every machine.
            best = torch.sort(values, descending=True, stable=True).indices[: counts[name]].cpu()
            before = self.masks.get(self.parameters[name])
            mask = torch.zeros(self._full[name], dtype=torch.bool)
            mask[best if before is None else before.flatten().cpu().nonzero().flatten()[best]] = True
            masks[self.parameters[name]] = mask.view(self._shapes_of_weights[name])
        return masks

    def _uniform(self, ratio: PerLayer) -> dict[str, int]:
        return widths_for_ratio(ratio, self.layers, skip=self._options.skip, limits=self._limits)

    def _erk(self, ratio: float) -> dict[str, int]:
        skipped = matching_layers("skip", self._options.skip, self.layers)
        shapes = {name: shape for name, shape in self._shapes_of_weights.items() if name not in skipped}
        # The rule knows layers by their shapes, so the density is that of all weights.
        remaining = {name: self.layers[name] for name in shapes}
        total = sum(self._full[name] for name in shapes) or 1
        densities = erk_densities(shapes, (1 - ratio) * (sum(remaining.values()) / total), remaining)
        return {
            name: self._limits.apply(int(self._full[name] * densities[name] + 1e-9), size)
            if name in densities
            else size
            for name, size in self.layers.items()
        }

    @cached_property
    def _weight_macs(self) -> dict[str, int]:
        return weight_macs(self.shapes, layer_macs(self.shapes, self.input_shape))

    @cached_property
    def _token_layers(self) -> set[str]:
        """The linear layers of which one image uses every weight more than once."""
        sizes = {name: parameter.numel() for name, parameter in self.shapes.named_parameters()}
        linear = {layer: weight for layer, weight, is_conv in _weights_of_layers(self.shapes) if not is_conv}
        return {layer for layer, weight in linear.items() if self._weight_macs.get(weight, 0) > sizes.get(weight, 0)}

    def _cost_of(self, counts: Mapping[str, int]) -> Cost:
        # From the numbers of weights alone: which ones go is not chosen yet.
        sizes = {self.parameters[name]: (size, size - counts[name]) for name, size in self._full.items()}
        for name, mask in self.masks.items():
            sizes.setdefault(name, (mask.numel(), mask.numel() - int(mask.sum())))
        macs_gone = sum(self._weight_macs.get(name, 0) * gone // size for name, (size, gone) in sizes.items())
        return Cost(self.full_cost.params - sum(gone for _, gone in sizes.values()), self.full_cost.macs - macs_gone)


Options = TypeVar("Options", bound=WeightOptions)


class WeightPruner(Pruner[Options, WeightTarget]):
    """Masks the weights of lowest score. A subclass defines :meth:`scores`; all else has a default.

    Examples
    --------
    >>> from rethink_prune import build_model
    >>> class LastWeights(WeightPruner):
    ...     def scores(self, model, target, *, data, generator):
    ...         return {name: -torch.arange(size) for name, size in target.layers.items()}
    >>> pruner, model = LastWeights(WeightOptions(name="last", ratio=0.5)), build_model("resnet20")
    >>> target = pruner.target(model, torch.zeros(1, 3, 32, 32))
    >>> pruner.prune(model, target, data=None, generator=torch.Generator()).report.layers[0]
    LayerWidth(layer='conv1', kept=432, full=432)
    """

    options_type: ClassVar[type[WeightOptions]] = WeightOptions

    @abstractmethod
    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return one finite score per weight for each of `target.layers`, flattened; the lowest go first.

        Parameters
        ----------
        model : torch.nn.Module
            The network, on the CPU; not to be changed. Weights that are gone are zero, and their scores do not count.
        target : WeightTarget
        data, generator
            As for :meth:`prune`.
        """

    @property
    def distribution(self) -> Distribution:
        """How the weights that stay are distributed over the layers: by one ranking of all."""
        return "global"

    def target(
        self,
        model: nn.Module,
        example: torch.Tensor,
        network: str | None = None,
        *,
        masks: Masks = {},  # noqa: B006 (read only)
    ) -> WeightTarget:
        """Apply the options to a network, which may have been pruned before: `masks` says what remains of it."""
        name = network or type(model).__name__
        return WeightTarget(self.options, model, example, name, distribution=self.distribution, masks=masks)

    def prune(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> PruneResult:
        """Score, count, and return a copy of `model` with masked weights set to zero.

        Raises
        ------
        UserError
            If weights or scores are not finite numbers, or if every weight stays.
        """
        # A copy: with nothing to cut, reshape changes no shape.
        pruned = reshape(model, Architecture())
        apply_masks(pruned, target.masks)
        # A threshold among values that are not numbers would mean nothing.
        weights = target.weights(pruned)
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise UserError(f"pruner: {name} has weights that are not finite")
        scores = self.scores(pruned, target, data=data, generator=generator)
        check_scores(scores, {name: weights[name].numel() for name in target.layers})
        scores = {name: scores[name] for name in target.layers}
        counts, warnings = target.counts(target.remaining(scores))
        target.check_removal(counts)
        # Layers that lose nothing have a mask as well: scratch arms draw all convolutions by one rule.
        masks = {**target.masks, **target.choose(scores, counts)}
        apply_masks(pruned, masks)
        return PruneResult(pruned, Architecture(masks=masks), target.report(counts, tuple(warnings)))


class StartPruner(WeightPruner[Options]):
    """Base of the pruners that rank the weights of a network as it was drawn."""

    at_start: ClassVar[bool] = True
    no_rounds: ClassVar[str] = "it prunes the network as it was drawn, once, before any training"


def _weights_of_layers(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Yield the layers that may take part, each with its weight's name, and whether it is a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            yield name, f"{name}.weight".lstrip("."), not isinstance(module, nn.Linear)
        elif isinstance(module, nn.MultiheadAttention):
            # No modules: parameters of the attention itself.
            for key in input_projections(module):
                weight = f"{name}.{key}".lstrip(".")
                yield weight.removesuffix("_weight"), weight, False


def erk_densities(
    shapes: Mapping[str, Sequence[int]], density: float, remaining: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return the share of weights that each layer keeps by the Erdos-Renyi-Kernel rule (Evci et al. 2020).

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        The shape of each layer's weight.
    density : float
        Share of all weights that stay.
    remaining : mapping of str to int, optional
        How many weights of each layer there are to keep; all of them by default.

    Examples
    --------
    >>> shapes = {"conv": (8, 3, 3, 3), "wide": (64, 64, 3, 3)}  # 17 / 216 and 134 / 36864
    >>> {name: round(share, 4) for name, share in erk_densities(shapes, 0.1).items()}
    {'conv': 1.0, 'wide': 0.0947}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    most = remaining or sizes
    wanted = density * sum(sizes.values())
    whole: set[str] = set()
    while True:
        shared = {name: sum(shape) for name, shape in shapes.items() if name not in whole}
        # The density is `scale * sum / product`, so the number of weights is `scale * sum`.
        left = wanted - sum(most[name] for name in whole)
        scale = left / sum(shared.values()) if shared else 0.0
        full = {name for name, dimensions in shared.items() if scale * dimensions >= most[name]}
        if not full:
            kept = {name: most[name] if name in whole else scale * shared[name] for name in shapes}
            return {name: kept[name] / sizes[name] for name in shapes}
        whole |= full
