"""Pruners decide what goes; ``surgery`` finds what belongs together and cuts. README.md beside this file lists them.

``pruner.py`` says what every pruner is, ``channel_pruner.py`` what those are that score channels, and
``reconstruction.py`` those that repair the layer that reads the channels. A file with a pruner's name is that pruner.
"""

from typing import Any

import torch
from torch import nn

from rethink_prune.config import parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.pruning.channel_pruner import ChannelPruner
from rethink_prune.pruning.pruner import Batches, Pruner, PruneReport, PruneResult, Target
from rethink_prune.pruning.registry import PRUNERS, find_pruner
from rethink_prune.seeds import derive_generator
from rethink_prune.training.hooks import TrainingHooks

__all__ = [
    "PRUNERS",
    "ChannelPruner",
    "PruneReport",
    "PruneResult",
    "Pruner",
    "Target",
    "TrainingHooks",
    "find_pruner",
    "prune",
]


def prune(
    model: nn.Module,
    pruner: str,
    *,
    example: torch.Tensor,
    network: str | None = None,
    data: Batches | None = None,
    seed: int = 0,
    **options: Any,
) -> PruneResult:
    """Prune a network.

    Parameters
    ----------
    model : torch.nn.Module
        Any network that ``torch.fx`` or ``torch.export`` can follow; left as it is.
    pruner : str
        One of :data:`PRUNERS`, or ``"path.to.module:Class"``.
    example : torch.Tensor
        One batch of the network's input, e.g. 1 x 3 x 32 x 32; only its shape and type matter.
    network : str, optional
        The network's name, for ``variant``; networks of :func:`~rethink_prune.build_model` know theirs.
    data : iterable of (images, labels), optional
        Training batches, for pruners that need them.
    seed : int
        For pruners that draw.
    **options
        The pruner's options: the target as exactly one of ``ratio``, ``variant``, ``widths``, ``target_macs``,
        ``target_params``; ``ranking``, ``scope``, ``skip``, ``min_channels``, ``round_to`` and the pruner's own.

    Returns
    -------
    PruneResult

    Raises
    ------
    UserError
        If an option is wrong or does not fit the network, a weight is not finite, or the pruner needs data and there
        is none.

    Examples
    --------
    >>> import torch
    >>> from rethink_prune import build_model, prune
    >>> result = prune(build_model("vgg16"), "l1", example=torch.randn(1, 3, 32, 32), variant="A")
    >>> sum(p.numel() for p in result.model.parameters())
    5397034
    """
    found = find_pruner(pruner)
    chosen = found(parse_pruner({"name": pruner, **options}, found.options_type))
    chosen.seed = seed
    if chosen.options.rounds is not None:
        raise UserError(
            f"pruner.rounds={chosen.options.rounds}: needs trainings in between; run a study, or prune again"
        )
    if chosen.needs_data and data is None:
        raise UserError(f"pruner.name={pruner}: needs training images: prune(..., data=batches of (images, labels))")
    for name, parameter in model.named_parameters():
        # A lazy parameter has no values to check before its first forward pass.
        if not nn.parameter.is_lazy(parameter) and not bool(torch.isfinite(parameter).all()):
            raise UserError(f"model: {name} is not finite")
    target = chosen.target(model, example, network or getattr(model, "network_name", None))
    return chosen.prune(model, target, data=data, generator=derive_generator(seed, "prune"))
