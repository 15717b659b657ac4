"""Structured pruning: pruners score, ``channels`` groups, ``surgery`` cuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rethink_prune.config import PrunerOptions, parse_pruner
from rethink_prune.errors import UserError
from rethink_prune.imports import import_object
from rethink_prune.pruning.l1 import L1
from rethink_prune.pruning.magnitude import Magnitude
from rethink_prune.pruning.pruner import Batches, Pruner, PruneReport, PruneResult, Target
from rethink_prune.pruning.random import Random
from rethink_prune.pruning.regression import Regression
from rethink_prune.pruning.slimming import Slimming
from rethink_prune.pruning.soft_filter import SoftFilter
from rethink_prune.pruning.sss import SSS
from rethink_prune.pruning.thinet import ThiNet
from rethink_prune.seeds import derive_generator

__all__ = ["PRUNERS", "PruneReport", "PruneResult", "Pruner", "Target", "find_pruner", "prune"]

PRUNERS: Mapping[str, type[Pruner]] = {
    "l1": L1,
    "thinet": ThiNet,
    "regression": Regression,
    "slimming": Slimming,
    "sss": SSS,
    "magnitude": Magnitude,
    "soft_filter": SoftFilter,
    "random": Random,
}


def find_pruner(name: str) -> type[Pruner]:
    """Return the class of the pruner of that name: an entry of :data:`PRUNERS`, or the import path ``module:Class``.

    Raises
    ------
    UserError
        If there is no such pruner.
    """
    if not isinstance(name, str):
        raise UserError(
            f"pruner: {name!r} is no name; give one of {', '.join(PRUNERS)}, or path.to.module:Class as text"
        )
    if name in PRUNERS:
        return PRUNERS[name]
    if ":" not in name:
        raise UserError(
            f"pruner.name={name}: no such pruner; one of {', '.join(PRUNERS)}, or your own as path.to.module:Class"
        )
    found = import_object(name, "pruner.name")
    if not (isinstance(found, type) and issubclass(found, Pruner)) or (
        found.scores is Pruner.scores and found.prune is Pruner.prune
    ):
        raise UserError(f"pruner.name={name}: must be a subclass of rethink_prune.pruning.Pruner that defines scores()")
    if not (isinstance(found.options_type, type) and issubclass(found.options_type, PrunerOptions)):
        raise UserError(f"pruner.name={name}: options_type must be a subclass of rethink_prune.config.ChannelOptions")
    return found


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
    """Prune a network; `model` itself is untouched.

    Parameters
    ----------
    model : torch.nn.Module
        Any network that ``torch.fx`` can trace.
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
        The pruner's options: exactly one target of ``ratio``, ``variant``, ``widths``, ``target_macs``,
        ``target_params``; ``ranking``, ``scope``, ``skip``, ``min_channels``, ``round_to`` and the pruner's own.

    Returns
    -------
    PruneResult
        With ``.model``, ``.architecture`` and ``.report``.

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
    if chosen.needs_data and data is None:
        raise UserError(f"pruner.name={pruner}: needs training images: prune(..., data=batches of (images, labels))")
    for name, parameter in model.named_parameters():
        if not nn.parameter.is_lazy(parameter) and not bool(torch.isfinite(parameter).all()):
            raise UserError(f"model: {name} is not finite")
    target = chosen.target(model, example, network or getattr(model, "network_name", None))
    return chosen.prune(model, target, data=data, generator=derive_generator(seed, "prune"))
