"""GraSP (Wang, Zhang, Grosse 2020, *Picking Winning Tickets Before Training*, ICLR, arXiv:2002.07376).

Prunes the network as it was drawn, before any training. With ``g`` the gradient of the loss and ``H`` its Hessian, a
weight's removal changes the gradient's squared norm, to first order, by ::

    score(w) = -w * (H g)

The weights of the *highest* score go: without them the gradient is smaller by least, or even larger. So those stay
whose ``w * (H g)`` is largest, with its sign. All weights of all layers are ranked together. ``H g`` is the derivative
of ``g`` times a constant copy of ``g``, by a second backward pass; both are over the weights that take part.

The logits are divided by 200, as in the authors' code: an untrained network is then never sure of a class. `images`
training images tell, or all if there are fewer; the authors take ten of each class, 100 for CIFAR-10, in two halves.
Here the batches are those of the training data: ``g`` is that of all, and ``H g`` sums their Hessians, each with the
statistics of its batch. As in the authors' code, batch norms take those statistics, as they will in training; a last
image that is alone in its batch is left out. See `gradients`.

The authors prune linear layers as well, and first draw them anew for the scores alone; here neither is done unless
``linear=true`` has linear layers take part, with the weights they have. See `weight_pruner` for the threshold and for
masks.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rethink_prune.errors import UserError
from rethink_prune.pruning.gradients import NO_GRADIENT, copy_for_gradients, losses_of_batches
from rethink_prune.pruning.pruner import Batches
from rethink_prune.pruning.samples import FirstImages
from rethink_prune.pruning.weight_pruner import StartPruner, WeightOptions, WeightScores, WeightTarget

TEMPERATURE = 200.0


class GraspOptions(WeightOptions):
    """How many weights go, and how many training images tell which."""

    # One image has no statistics for batch norms.
    images: Annotated[int, Field(ge=2, le=10**9)] = 100


class Grasp(StartPruner[GraspOptions]):
    """Masks the weights without which the initial network's gradient is largest.

    :source: Wang et al. 2020
    :goes: single weights, before any training
    :by: weight times Hessian times gradient, with its sign, ranked over all layers; masks
    """

    name = "grasp"
    options_type = GraspOptions
    needs_data = True

    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return ``w * (H g)`` of each weight in float64: the opposite of the published score, whose highest go."""
        images = FirstImages(data, self.options.images, target.input_shape)
        copy = copy_for_gradients(model, images.device, batch_statistics=True)
        weights = [*target.weights(copy).values()]
        zeros = [torch.zeros_like(weight) for weight in weights]
        gradient, product, seen = zeros, zeros, 0
        for loss, count in losses_of_batches(copy, images, temperature=TEMPERATURE):
            parts = torch.autograd.grad(loss * count, weights, allow_unused=True, materialize_grads=True)
            gradient = [whole + part for whole, part in zip(gradient, parts, strict=True)]
            seen += count
        if not seen:
            raise UserError("data: grasp needs batches of two images or more, for the statistics of batch norms")
        if not any(part.any() for part in gradient):
            raise UserError(f"pruner.name={self.options.name}: {NO_GRADIENT}")
        # Torch's fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for loss, count in losses_of_batches(copy, images, temperature=TEMPERATURE):
                parts = torch.autograd.grad(
                    loss * count, weights, create_graph=True, allow_unused=True, materialize_grads=True
                )
                flow = torch.stack([(g * part).sum() for g, part in zip(gradient, parts, strict=True)]).sum()
                parts = torch.autograd.grad(flow, weights, allow_unused=True, materialize_grads=True)
                product = [whole + part for whole, part in zip(product, parts, strict=True)]
        return {
            name: (weight.detach() * part).flatten().double().cpu() / seen**2
            for name, weight, part in zip(target.layers, weights, product, strict=True)
        }
