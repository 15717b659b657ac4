"""Network slimming (Liu et al. 2017, arXiv:1708.06519).

The stage ``sparse`` trains the network from scratch with an L1 penalty on the scales ``gamma`` of its batch norms, as a
subgradient that is added before each step::

    grad(gamma) += strength * sign(gamma)

for every 2-D batch norm, whether its channels can be pruned or not, and for 1-D ones (after linear layers) with
``linear=true``. Then all prunable channels are ranked together: of ``n`` values ``|gamma|`` in ascending order, that at
index ``int(n * ratio)`` is the threshold, and what is not above it goes.

Where a batch norm reads a stream that others read as well (pre-activation residual blocks, dense blocks), the stream
stays whole, and the batch norm selects the channels it normalises. A channel is removed as if gamma and beta were zero,
so nothing is left of a beta. A unit of several channels (a group of a grouped convolution) scores their mean
``|gamma|``. A layer that the threshold would empty keeps its best channel, and the report says so.

The widths follow from the trained scales, so scratch arms wait for the stage ``prune``; `variant` has no published
entry, because the authors report ratios, not widths.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import nn

from rethink_prune.config import ChannelOptions, Frozen, Positive
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import OF_TOKENS, ChannelPruner, ChannelTarget, Groups, Scores, score_units
from rethink_prune.pruning.pruner import FOR_TOKENS, Batches
from rethink_prune.surgery.channels import ChannelGroup, Positions
from rethink_prune.training.hooks import TrainingHooks


class SlimmingTraining(Frozen):
    """Options of the stage ``sparse``: the factor of the L1 penalty; without it, the recipe's or the published one."""

    strength: Positive | None = None


class SlimmingOptions(ChannelOptions):
    """Channels ranked together, unless told otherwise; with `linear`, those of linear layers as well."""

    ranking: Literal["layer", "global"] = "global"
    linear: bool = False
    sparse: SlimmingTraining = SlimmingTraining()

    def with_strength(self, recipe: float | None, *, network: str, dataset: str) -> Self:
        """Return the options with a strength: published are 1e-4 for VGG on CIFAR, and 1e-5 for all else."""
        published = 1e-4 if network.startswith("vgg") and dataset != "imagenet" else 1e-5
        strength = self.sparse.strength or recipe or published
        return self.model_copy(update={"sparse": SlimmingTraining(strength=strength)})


class Slimming(ChannelPruner[SlimmingOptions]):
    """Scores a channel by the magnitude of its batch norm's scale.

    :source: Liu et al. 2017
    :goes: channels, and inputs of pre-activation and dense blocks
    :by: batch-norm scales, ranked over all layers
    :trains: L1 penalty on the scales
    """

    name = "slimming"
    position = 4
    options_type = SlimmingOptions
    selecting = "norm"
    trains_sparse = True
    in_rounds = False
    meant_for = "channels that pass a batch norm"
    no_rounds = "its penalty on the scales is part of one training, that of the unpruned network"

    def target(self, model: nn.Module, example: torch.Tensor, network: str | None = None) -> ChannelTarget:
        """Apply the options to a network; refuse one without scales to rank."""
        where = f"pruner.name={self.options.name}: ranks channels by the scales of batch norms, and"
        # Said before the analysis, which would only find that no channel passes a batch norm.
        if not self._scaled_norms(model):
            normalised = any(isinstance(module, nn.LayerNorm) for module in model.modules())
            hint = f", so it has no meaning there; {FOR_TOKENS}" if normalised else ""
            raise UserError(f"{where} {network or type(model).__name__} has none{hint}")
        target = super().target(model, example, network)
        for norm in (norm for group in target.groups for norm in group.norms):
            if getattr(model.get_submodule(norm), "weight", None) is None:
                raise UserError(f"{where} {norm} has none (affine=False)")
        return target

    def may_touch(self, group: ChannelGroup) -> bool:
        """Tell whether each unit passes a batch norm; linear layers only if the options say so."""
        scaled = all(any(positions) for positions in zip(*group.norms.values(), strict=True))
        return bool(group.norms) and scaled and (group.kind not in ("linear", *OF_TOKENS) or self.options.linear)

    def sparse(self, target: ChannelTarget) -> TrainingHooks:
        """Return the L1 subgradient."""
        strength = self.options.sparse.strength
        assert strength is not None  # a study's options have it filled in
        return ScalePenalty(strength, self._scaled_norms(target.shapes))

    def _scaled_norms(self, model: nn.Module) -> list[str]:
        """Return the names of the batch norms whose scales are penalised."""
        kinds = (nn.BatchNorm2d, *((nn.BatchNorm1d,) if self.options.linear else ()))
        modules = model.named_modules()
        return [name for name, module in modules if isinstance(module, kinds) and module.weight is not None]

    def scores(self, model: nn.Module, groups: Groups, *, data: Batches, generator: torch.Generator) -> Scores:
        """Return each unit's mean ``|gamma|`` in float64."""
        norms = {norm for group in groups for norm in group.norms}
        magnitudes = {norm: model.get_parameter(f"{norm}.weight").detach().double().abs() for norm in norms}

        def units(group: ChannelGroup) -> Iterator[Mapping[str, Positions]]:
            for positions in zip(*group.norms.values(), strict=True):
                yield dict(zip(group.norms, positions, strict=True))

        return {group.name: score_units(units(group), magnitudes.__getitem__, torch.mean) for group in groups}


class ScalePenalty(TrainingHooks):
    """Adds the subgradient of ``strength * sum |gamma|`` over batch norms.

    Parameters
    ----------
    strength : float
    norms : sequence of str
        Names of the batch norms: processes that train together may have replaced them by others.
    """

    replayable = True

    def __init__(self, strength: float, norms: Sequence[str]) -> None:
        self._strength = strength
        self._norms = norms

    @property
    def key(self) -> Mapping[str, Any]:
        """The strength, and which batch norms it acts on."""
        return {"strength": self._strength, "norms": list(self._norms)}

    @torch.no_grad()
    def before_step(self, model: nn.Module, lr: float) -> None:
        """Add ``strength * sign(gamma)`` to the gradients."""
        for name in self._norms:
            scale = model.get_parameter(f"{name}.weight")
            # A frozen scale has no gradient, and is not penalised.
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=self._strength)
