"""SNIP (Lee, Ajanthan, Torr 2019, *SNIP: Single-shot Network Pruning*, ICLR, arXiv:1810.02340).

Prunes the network as it was drawn, before any training. How much the loss of some images depends on whether a weight is
there is the derivative by a factor in front of it::

    score(w) = |g w| / sum over all weights of |g w|,    g = d loss / d w

All weights of all layers are ranked together, and the lowest scores go. The gradient is that of the mean loss of the
first `images` training images, or of all if there are fewer. The authors take one batch: 100 images in their code, 128
for CIFAR-10 in the paper.

As in the authors' code, batch norms take their running statistics: those of a network that was just drawn leave values
as they are. See `gradients`. The authors prune biases and linear layers as well, here convolutions (with
``linear=true`` linear layers, too), and they draw the weights anew after pruning: that is the arm ``scratch_e``, while
``lottery`` trains the weights that were ranked. See `weight_pruner` for the threshold and for masks.
"""

import torch
from torch import nn

from rethink_prune.config import Count
from rethink_prune.errors import UserError
from rethink_prune.pruning.gradients import NO_GRADIENT, copy_for_gradients, losses_of_batches
from rethink_prune.pruning.pruner import Batches
from rethink_prune.pruning.samples import FirstImages
from rethink_prune.pruning.weight_pruner import StartPruner, WeightOptions, WeightScores, WeightTarget


class SnipOptions(WeightOptions):
    """How many weights go, and how many training images tell which."""

    images: Count = 100


class Snip(StartPruner[SnipOptions]):
    """Masks the weights on which the loss of the initial network depends least.

    :source: Lee et al. 2019
    :goes: single weights, before any training
    :by: absolute value of weight times gradient, ranked over all layers; masks
    """

    name = "snip"
    options_type = SnipOptions
    needs_data = True

    def scores(
        self, model: nn.Module, target: WeightTarget, *, data: Batches, generator: torch.Generator
    ) -> WeightScores:
        """Return each weight's share of the sum of ``|g w|``, in float64."""
        images = FirstImages(data, self.options.images, target.input_shape)
        copy = copy_for_gradients(model, images.device)
        for loss, count in losses_of_batches(copy, images):
            (loss * count).backward()
        scores = {}
        for name, weight in target.weights(copy).items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            scores[name] = (gradient * weight.detach()).abs().flatten().double().cpu()
        total = sum(float(values.sum()) for values in scores.values())
        if total == 0:
            raise UserError(f"pruner.name={self.options.name}: {NO_GRADIENT}")
        return {name: values / total for name, values in scores.items()}
