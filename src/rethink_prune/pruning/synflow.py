"""SynFlow (Tanaka et al. 2020, *Pruning neural networks without any data*, NeurIPS, arXiv:2006.05467).

Prunes the network as it was drawn, before any training and without images. The network is given the absolute values of
all its parameters and running statistics, and an input of ones; with ``R`` the sum of its outputs, ::

    score(w) = |w * dR / dw|

All weights of all layers are ranked together, and the lowest scores go, in `iterations` steps (100, as published). A
share of ``(1 - ratio)^(k / n)`` of the weights stays after step ``k`` of ``n``, and the scores of the next step are
those of what stays. What is gone stays gone. Where a target states a cost, the cost falls in the same way.

Batch norms take their running statistics, as in the authors' code: with those of the batch, a score would depend on one
image's own mean. All is computed in float64, because ``R`` grows with a power of the depth. Where it overflows all the
same, an error says so.

A layer norm divides by what it reads, and a softmax compares: behind either, a score no longer counts the positive
paths through a weight. So networks with layer norms or `nn.MultiheadAttention` are refused.

The authors prune linear layers as well; here they take part with ``linear=true``. See `weight_pruner` for the threshold
and for masks.
"""

from collections.abc import Mapping

import torch
from torch import nn

from rethink_prune.config import Count
from rethink_prune.copying import copy_network
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches
from rethink_prune.pruning.weight_pruner import StartPruner, WeightOptions, WeightScores, WeightTarget
from rethink_prune.surgery.architecture import Masks, apply_masks


class SynflowOptions(WeightOptions):
    """How many weights go, and in how many steps."""

    iterations: Count = 100


class Synflow(StartPruner[SynflowOptions]):
    """Masks, step by step, the weights that least of the initial network's positive paths run through.

    :source: Tanaka et al. 2020
    :goes: single weights, before any training
    :by: weight times gradient of the summed output, of absolute weights and an input of ones, in many steps; masks
    """

    name = "synflow"
    options_type = SynflowOptions

    def target(
        self,
        model: nn.Module,
        example: torch.Tensor,
        network: str | None = None,
        *,
        masks: Masks = {},  # noqa: B006 (read only)
    ) -> WeightTarget:
        """Apply the options to a network; refuse one whose outputs are not sums over paths."""
        for name, module in model.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)):
                raise UserError(
                    f"pruner.name={self.options.name}: counts positive paths, which end in {name} "
                    f"({type(module).__name__}), so it has no meaning for {network or type(model).__name__}; "
                    "magnitude, lamp, snip and grasp prune its single weights"
                )
        return super().target(model, example, network, masks=masks)

    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return the scores of the last step in float64, after the steps before it; what these removed scores -1."""
        copy = copy_network(model).double().eval()
        with torch.no_grad():
            for tensor in (*copy.parameters(), *copy.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        weights = {name: weight.requires_grad_() for name, weight in target.weights(copy).items()}
        scores = self._flow(copy, weights, target)
        for step in range(1, self.options.iterations):
            counts, _ = target.counts(target.remaining(scores), progress=step / self.options.iterations)
            masks = target.choose(scores, counts)
            apply_masks(copy, masks)
            flow = self._flow(copy, weights, target)
            # Below any score, so that a weight of a path that is broken elsewhere does not take its place.
            kept = {name: masks[weight].flatten() for name, weight in target.parameters.items()}
            scores = {name: values.masked_fill(~kept[name], -1.0) for name, values in flow.items()}
        return scores

    def _flow(
        self, model: nn.Module, weights: Mapping[str, torch.Tensor], target: WeightTarget
    ) -> dict[str, torch.Tensor]:
        total = model(torch.ones(1, *target.input_shape, dtype=torch.float64)).sum()
        if not torch.isfinite(total):
            raise UserError(f"pruner.name={self.options.name}: the sum of the outputs is too large for a number")
        parts = torch.autograd.grad(total, [*weights.values()], allow_unused=True, materialize_grads=True)
        pairs = zip(weights.items(), parts, strict=True)
        return {name: (weight.detach() * part).abs().flatten() for (name, weight), part in pairs}
