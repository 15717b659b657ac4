"""Gradients of a network's loss, for pruners that rank what goes by them.

They are those of a copy: the network itself, its gradients, mode and running statistics stay as they are. Dropout is
off. The loss is cross entropy.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.copying import copy_network
from rethink_prune.errors import UserError
from rethink_prune.pruning.samples import FirstImages

NO_GRADIENT = (
    "every weight's gradient is zero, so none ranks first; none passes a last layer of zeros, with which torchvision's "
    "transformers start"
)


def copy_for_gradients(model: nn.Module, device: torch.device, *, batch_statistics: bool = False) -> nn.Module:
    """Return a copy of a network in evaluation mode, every parameter of which takes a gradient.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    device : torch.device
        Where the copy is to be.
    batch_statistics : bool
        Whether batch norms take the statistics of each batch, as in training, instead of the running ones.

    Examples
    --------
    >>> copy = copy_for_gradients(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), torch.device("cpu"))
    >>> [module.training for module in copy]
    [False, False]
    """
    copy = copy_network(model).to(device).eval()
    for parameter in copy.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    for module in copy.modules():
        if batch_statistics and isinstance(module, _BatchNorm):
            module.train()
    return copy


def losses_of_batches(
    model: nn.Module, images: FirstImages, *, temperature: float = 1.0
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the mean loss of each batch, with the number of its images.

    Parameters
    ----------
    model : torch.nn.Module
        From `copy_for_gradients`.
    images : FirstImages
    temperature : float
        Divides the logits.

    Raises
    ------
    UserError
        If a loss is not finite, or if the labels do not fit the network.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    takes_batches = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    for pixels, labels in images.labelled():
        # One image alone has no statistics; training drops such a remainder as well.
        if takes_batches and len(pixels) == 1:
            continue
        logits = model(pixels.to(parameter.device, parameter.dtype).contiguous())
        classes = logits.shape[-1]
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise UserError(f"data: labels must be from 0 to {classes - 1}: the network has {classes} classes")
        loss = F.cross_entropy(logits / temperature, labels.to(parameter.device))
        if not torch.isfinite(loss):
            raise UserError("pruner: the loss of the network is not finite, so it has no gradients to rank by")
        yield loss, len(pixels)
