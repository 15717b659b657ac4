"""Optimisers and learning-rate schedules by name; the classes are PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)


@dataclass(frozen=True)
class OptimizerSpec:
    """What `build_optimizer` and `build_scheduler` need.

    Attributes
    ----------
    optimizer : {"sgd", "adamw"}
    lr, momentum, weight_decay : float
        `momentum` and `nesterov` are for SGD. Weight decay acts on every parameter, as in the paper, unless
        `decay_norms` is False.
    schedule : {"multistep", "cosine", "constant"}
        Changes the learning rate after whole epochs; ``cosine`` falls to zero over `epochs`.
    epochs : int
    milestones : tuple of int
        Epochs after which ``multistep`` multiplies the learning rate.
    gammas : tuple of float
        What it is multiplied by, for each milestone.
    warmup : int
        Epochs in which the learning rate rises from ``lr / (warmup + 1)`` in equal steps; ``cosine`` begins after them.
    decay_norms : bool
        Whether weight decay acts on norms and biases: parameters of one dimension.
    label_smoothing : float
        Of the training loss, in [0, 1).
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


def build_optimizer(parameters: Iterable[nn.Parameter], spec: OptimizerSpec, *, fused: bool) -> Optimizer:
    """Return the optimiser; `fused` updates all parameters in one kernel, which CUDA can record."""
    groups = _groups(parameters, spec)
    match spec.optimizer:
        case "sgd":
            return SGD(
                groups,
                lr=spec.lr,
                momentum=spec.momentum,
                nesterov=spec.nesterov,
                weight_decay=spec.weight_decay,
                fused=fused,
            )
        case "adamw":
            return AdamW(groups, lr=spec.lr, weight_decay=spec.weight_decay, fused=fused, capturable=fused)
    raise ValueError(f"optimizer={spec.optimizer}: must be sgd or adamw")


def _groups(parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> list[dict[str, Any]]:
    if spec.decay_norms:
        return [{"params": list(parameters)}]
    every = list(parameters)
    weights, others = [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def build_scheduler(optimizer: Optimizer, spec: OptimizerSpec) -> LRScheduler:
    """Return the schedule, to be stepped once after every epoch."""
    if not spec.warmup:
        return _decay(optimizer, spec)
    rise = LinearLR(optimizer, start_factor=1 / (spec.warmup + 1), total_iters=spec.warmup)
    rest = replace(
        spec, epochs=spec.epochs - spec.warmup, milestones=tuple(max(0, m - spec.warmup) for m in spec.milestones)
    )
    return SequentialLR(optimizer, [rise, _decay(optimizer, rest)], milestones=[spec.warmup])


def _decay(optimizer: Optimizer, spec: OptimizerSpec) -> LRScheduler:
    match spec.schedule:
        case "multistep":
            if len(set(spec.gammas)) == 1:
                return MultiStepLR(optimizer, list(spec.milestones), spec.gammas[0])
            changes = list(zip(spec.milestones, spec.gammas, strict=True))
            return LambdaLR(optimizer, lambda epoch: math.prod(gamma for m, gamma in changes if m <= epoch))
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=spec.epochs)
        case "constant":
            return ConstantLR(optimizer, factor=1.0)
    raise ValueError(f"schedule={spec.schedule}: must be multistep, cosine or constant")
