"""Distillation: a network learns from the outputs of a trained one, its teacher, as well as from the labels.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531). With logits ``z`` of the network
and ``v`` of the teacher, temperature ``T`` and weight ``w``, the loss of an image is

    w * T^2 * KL(softmax(v / T) || softmax(z / T)) + (1 - w) * cross-entropy(z, label)

The factor ``T^2`` keeps the size of the gradients where the temperature changes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rethink_prune.outputs import main_output, output_loss
from rethink_prune.training.distributed import Processes
from rethink_prune.training.runtime import Runtime


@dataclass(frozen=True)
class Teacher:
    """A trained network that another one learns from; it stays as it is.

    Attributes
    ----------
    network : torch.nn.Module
    temperature : float
        What logits are divided by, above 0: the higher, the more the teacher's lesser guesses count.
    weight : float
        Share of the teacher in the loss, from 0 to 1; the labels have the rest.

    Examples
    --------
    >>> from rethink_prune.training.runtime import Runtime
    >>> images, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([2])
    >>> teacher = Teacher(nn.Identity(), temperature=4.0, weight=1.0)
    >>> runtime = Runtime(torch.device("cpu"), "fp32")
    >>> float(teacher.loss(images, images, labels, runtime=runtime))  # the network says what its teacher says
    0.0
    """

    network: nn.Module
    temperature: float
    weight: float

    def prepare(self, runtime: Runtime, processes: Processes) -> "Teacher":
        """Make the network ready to teach, in place: on the device, with the first process's weights, fixed.

        Gives the teacher itself.
        """
        network = runtime.place(self.network).eval().requires_grad_(False)
        processes.share_state(network)
        return self

    def loss(
        self, images: Tensor, output: object, labels: Tensor, *, runtime: Runtime, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the mean loss of what a network gave for a batch of images.

        Parameters
        ----------
        images : Tensor
            The batch, as the network has seen it.
        output : object
            What the network returned: logits N x classes, perhaps among other things.
        labels : Tensor
            N class numbers, or N x classes: their shares.
        runtime : Runtime
            Has the precision in which the teacher computes.
        label_smoothing : float
            Of the labels' part of the loss, in [0, 1).
        """
        with torch.no_grad(), runtime.autocast():
            lesson = main_output(self.network(images))
        # In float32 also where the logits are bfloat16, whose 8 bits are too few for a softmax.
        told, asked = lesson.float() / self.temperature, main_output(output).float() / self.temperature
        divergence = F.kl_div(
            F.log_softmax(asked, dim=1), F.log_softmax(told, dim=1), reduction="batchmean", log_target=True
        )
        taught = self.temperature**2 * divergence
        learned = output_loss(output, labels, label_smoothing=label_smoothing)
        return self.weight * taught + (1 - self.weight) * learned
