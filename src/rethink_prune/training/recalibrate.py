"""Estimating the statistics of batch norms anew, without changing a weight."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.data.batches import Batch
from rethink_prune.training.runtime import Runtime


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch], *, runtime: Runtime) -> bool:
    """Replace the running statistics of all batch norms by their averages over images; leave in evaluation mode.

    After channels are removed, the statistics are still those of the unpruned network. What is evaluated with them
    tells more about them than about which channels went. All else is as in evaluation, without dropout.

    Parameters
    ----------
    model : torch.nn.Module
        On the device; changed in place.
    batches : iterable of (images, labels)
        Shuffled training images, not augmented.
    runtime : Runtime

    Returns
    -------
    bool
        Whether there are running statistics.

    Examples
    --------
    >>> model, labels = nn.Sequential(nn.BatchNorm2d(3)), torch.zeros(4)
    >>> batches = [(torch.full((4, 3, 2, 2), value), labels) for value in (1.0, 3.0)]
    >>> recalibrate(model, batches, runtime=Runtime(torch.device("cpu"), "fp32"))
    True
    >>> model[0].running_mean
    tensor([2., 2., 2.])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return False
    before = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
        # By hand: a network may keep its norms in evaluation mode whatever train() asks for.
        norm.training = True
    full = 0
    for images, _ in batches:
        # A smaller batch, the last one, would count as much as a full one.
        if len(images) >= full:
            full = len(images)
            with runtime.autocast():
                model(runtime.take(images))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()
    return True
