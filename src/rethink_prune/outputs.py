"""What networks return: logits alone, or logits among other things, such as those of auxiliary heads."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The names of the logits in outputs with names.
_MAIN = ("logits", "out")
# torchvision's networks with auxiliary heads: by the class of their output in training mode, its fields with the
# weights of their losses: 0.3 in GoogLeNet (arXiv:1409.4842), 0.4 in torchvision's recipe of Inception v3.
_AUXILIARY = {
    "GoogLeNetOutputs": {"aux_logits2": 0.3, "aux_logits1": 0.3},
    "InceptionOutputs": {"aux_logits": 0.4},
}


def main_output(output: Any) -> Any:
    """Return the logits among what a network returns: the field ``logits`` or ``out``, or else the first value.

    Examples
    --------
    >>> main_output({"aux": torch.zeros(1), "out": torch.ones(1)})
    tensor([1.])
    >>> main_output((torch.ones(1), torch.zeros(1)))
    tensor([1.])
    """
    if isinstance(output, Tensor):
        return output
    for name in _MAIN:
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if hasattr(output, name):
            return getattr(output, name)
    values = list(output.values()) if isinstance(output, Mapping) else output
    return values[0] if isinstance(values, list | tuple) and values else output


def output_loss(output: Any, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the logits, and of torchvision's auxiliary heads with their weights.

    Labels are class numbers (N) or the shares of the classes (N x classes).
    """

    def cross_entropy(logits: Tensor) -> Tensor:
        # In float32 also where the logits are bfloat16, whose 8 bits are too few for a softmax.
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    loss = cross_entropy(main_output(output))
    for name, weight in _auxiliary_weights(output).items():
        logits = getattr(output, name)
        if logits is not None:  # of a head that is switched off
            loss = loss + weight * cross_entropy(logits)
    return loss


def loss_and_correct(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss of a batch and how many of its images are classified correctly, on their device.

    Of an image with shares of several classes (N x classes), the class with the largest share is the correct one.

    Examples
    --------
    >>> loss_and_correct(torch.tensor(1.5), torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor([1.5000, 1.0000], dtype=torch.float64)
    """
    # Double, because in float32 the sum over an epoch of a million images loses digits.
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    return torch.stack([loss_sum.double(), (logits.argmax(1) == classes).sum().double()])


def unused_outputs(output: Any) -> bool:
    """Tell whether a network returns more than is trained on."""
    return not isinstance(output, Tensor) and not _auxiliary_weights(output)


def _auxiliary_weights(output: Any) -> Mapping[str, float]:
    kind = type(output)
    return _AUXILIARY.get(kind.__name__, {}) if kind.__module__.startswith("torchvision.models.") else {}
