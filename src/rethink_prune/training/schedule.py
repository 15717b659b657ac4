"""Optimisers and learning-rate schedules by name; the classes are PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR


@dataclass(frozen=True)
class OptimizerSpec:
    """What `build_optimizer` and `build_scheduler` need.

    Attributes
    ----------
    optimizer : {"sgd", "adamw"}
    lr, momentum, weight_decay : float
        `momentum` and `nesterov` are for SGD. Weight decay acts on every parameter, as in the paper.
    schedule : {"multistep", "cosine", "constant"}
        Changes the learning rate after whole epochs; ``cosine`` falls to zero over `epochs`.
    epochs : int
    milestones : tuple of int
        Epochs after which ``multistep`` multiplies the learning rate.
    gammas : tuple of float
        What it is multiplied by, for each milestone.
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


def build_optimizer(parameters: Iterable[nn.Parameter], spec: OptimizerSpec, *, fused: bool) -> Optimizer:
    """Return the optimiser; `fused` updates all parameters in one kernel."""
    match spec.optimizer:
        case "sgd":
            return SGD(
                parameters,
                lr=spec.lr,
                momentum=spec.momentum,
                nesterov=spec.nesterov,
                weight_decay=spec.weight_decay,
                fused=fused,
            )
        case "adamw":
            return AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=fused)
    raise ValueError(f"optimizer={spec.optimizer}: must be sgd or adamw")


def build_scheduler(optimizer: Optimizer, spec: OptimizerSpec) -> LRScheduler:
    """Return the schedule, to be stepped once after every epoch."""
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
