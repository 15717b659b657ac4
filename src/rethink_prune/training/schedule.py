"""Optimisers and learning-rate schedules by name; the classes are PyTorch's own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from rethink_prune.training.adaptive_start import AdaptiveStart


@dataclass(frozen=True)
class OptimizerSpec:
    """What `build_optimizer` and `build_scheduler` need.

    Attributes
    ----------
    optimizer : {"sgd", "adamw"}
    lr, momentum, weight_decay : float
        `momentum` and `nesterov` are for SGD. Weight decay acts on every parameter, as in the paper, unless
        `decay_norms` is False.
    schedule : {"multistep", "cosine", "constant", "linear"}
        Changes the learning rate after whole epochs; ``cosine`` and ``linear`` fall to zero over `epochs`.
    epochs : int
    milestones : tuple of int
        Epochs after which ``multistep`` multiplies the learning rate.
    gammas : tuple of float
        What it is multiplied by, for each milestone.
    warmup : int
        Epochs in which the learning rate rises from ``lr / (warmup + 1)`` in equal steps. ``cosine`` and ``linear``
        begin after them.
    decay_norms : bool
        Whether weight decay acts on more than the weights of layers: also on norms and biases, and on parameters such
        as class tokens and position embeddings.
    label_smoothing : float
        Of the training loss, in [0, 1).
    start : AdaptiveStart, optional
        Says what share of `lr` the training starts from, which has to be put in its place before it begins.
    passed : int
        Epochs of the schedule that lie before the training: it has the last `epochs` of ``passed + epochs``.
    """

    optimizer: str
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: str
    epochs: int
    milestones: tuple[int, ...]
    gammas: tuple[float, ...]
    warmup: int = 0
    decay_norms: bool = True
    label_smoothing: float = 0.0
    start: AdaptiveStart | None = None
    passed: int = 0


def build_optimizer(
    parameters: Iterable[nn.Parameter], spec: OptimizerSpec, *, fused: bool, model: nn.Module | None = None
) -> Optimizer:
    """Return the optimiser.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        What it updates.
    spec : OptimizerSpec
    fused : bool
        Update all parameters in one kernel, which CUDA can record.
    model : torch.nn.Module, optional
        Has the names of parameters, which tell the weights of layers from others.

    Examples
    --------
    >>> spec = OptimizerSpec("adamw", 0.1, 0.0, False, 1e-4, "cosine", 10, (), (), decay_norms=False)
    >>> optimizer = build_optimizer(nn.Linear(3, 2).parameters(), spec, fused=False)
    >>> [(group["params"][0].ndim, group["weight_decay"]) for group in optimizer.param_groups]
    [(2, 0.0001), (1, 0.0)]
    """
    groups = _parameter_groups(list(parameters), spec, model)
    match spec.optimizer:
        case "sgd":
            momentum, decay = spec.momentum, spec.weight_decay
            return SGD(groups, spec.lr, momentum, weight_decay=decay, nesterov=spec.nesterov, fused=fused)
        case "adamw":
            # `capturable` has AdamW count its steps on the device: a recorded step runs no Python that could count.
            return AdamW(groups, lr=spec.lr, weight_decay=spec.weight_decay, fused=fused, capturable=fused)
    raise ValueError(f"optimizer={spec.optimizer}: must be sgd or adamw")


def _parameter_groups(
    parameters: list[nn.Parameter], spec: OptimizerSpec, model: nn.Module | None
) -> list[dict[str, Any]]:
    if spec.decay_norms:
        return [{"params": parameters}]
    named = {} if model is None else dict(model.named_parameters())
    free = {id(parameter) for name, parameter in named.items() if not _names_a_weight(name)}
    # Scales, shifts and biases have one dimension.
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in free]
    kept = {id(p) for p in decayed}
    return [{"params": decayed}, {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0}]


def _names_a_weight(name: str) -> bool:
    """Tell the weights of layers from tokens, embeddings of positions, tables of biases and scales of layers.

    Examples
    --------
    >>> names = ["qkv.weight", "attention.in_proj_weight", "fc.parametrizations.weight.original", "cls_token", "gamma"]
    >>> [_names_a_weight(name) for name in names]
    [True, True, True, False, False]
    """
    return any("weight" in part for part in name.split(".")[-2:])


def build_scheduler(optimizer: Optimizer, spec: OptimizerSpec) -> lr_scheduler.LRScheduler:
    """Return the schedule, to be stepped once after every epoch.

    Examples
    --------
    >>> spec = OptimizerSpec("sgd", 0.3, 0.9, False, 0.0, "constant", epochs=4, milestones=(), gammas=(), warmup=2)
    >>> optimizer = build_optimizer(nn.Linear(1, 1).parameters(), spec, fused=False)
    >>> scheduler = build_scheduler(optimizer, spec)
    >>> rates = []
    >>> for epoch in range(4):
    ...     rates.append(round(scheduler.get_last_lr()[0], 3))
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [0.1, 0.2, 0.3, 0.3]
    """
    if spec.passed:
        rates = _rates_of(replace(spec, epochs=spec.passed + spec.epochs, passed=0))[spec.passed :]
        # The schedule is asked once more after the last epoch.
        return lr_scheduler.LambdaLR(optimizer, lambda epoch: rates[min(epoch, len(rates) - 1)] / spec.lr)
    if not spec.warmup:
        return _build_decay(optimizer, spec)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (spec.warmup + 1), total_iters=spec.warmup)
    # SequentialLR counts the epochs of the second schedule from its own start.
    milestones = tuple(max(0, milestone - spec.warmup) for milestone in spec.milestones)
    decay = _build_decay(optimizer, replace(spec, epochs=spec.epochs - spec.warmup, milestones=milestones))
    return lr_scheduler.SequentialLR(optimizer, [rise, decay], milestones=[spec.warmup])


def _rates_of(spec: OptimizerSpec) -> list[float]:
    """Return the learning rate of every epoch of a schedule."""
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], spec, fused=False)
    scheduler = build_scheduler(optimizer, spec)
    rates = []
    for _ in range(spec.epochs):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def _build_decay(optimizer: Optimizer, spec: OptimizerSpec) -> lr_scheduler.LRScheduler:
    match spec.schedule:
        case "multistep":
            if len(set(spec.gammas)) == 1:
                return lr_scheduler.MultiStepLR(optimizer, list(spec.milestones), spec.gammas[0])
            # PyTorch's MultiStepLR has one gamma for all milestones; some published schedules have several.
            changes = list(zip(spec.milestones, spec.gammas, strict=True))
            return lr_scheduler.LambdaLR(
                optimizer, lambda epoch: math.prod(gamma for milestone, gamma in changes if milestone <= epoch)
            )
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=spec.epochs)
        case "linear":
            return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=spec.epochs)
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    raise ValueError(f"schedule={spec.schedule}: must be multistep, cosine, constant or linear")
