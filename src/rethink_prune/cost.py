"""Parameters and multiply-accumulates of a network.

Conventions: MACs are those of convolutions and linear layers for one image, one multiply-accumulate counting once;
training costs 6 FLOPs per MAC and image (two for the forward pass, four for the backward pass).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rethink_prune.errors import UserError

TRAIN_FLOPS_PER_MAC = 6


@dataclass(frozen=True)
class Cost:
    """What a network costs: `params`, and `macs` per image."""

    params: int
    macs: int

    def train_flops(self, images: int) -> int:
        """Return the FLOPs of training on `images` images (each epoch counts its images again)."""
        return TRAIN_FLOPS_PER_MAC * self.macs * images


def count_cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Count the parameters of `model` and the MACs of one image.

    Parameters
    ----------
    model : torch.nn.Module
        Any network; left as it is.
    input_shape : sequence of int
        Shape of one image, C x H x W.

    Returns
    -------
    Cost

    Examples
    --------
    >>> from rethink_prune import build_model, count_cost
    >>> count_cost(build_model("resnet56"), (3, 32, 32))
    Cost(params=853018, macs=125485696)
    """
    shapes = on_meta(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *input_shape, device="meta"))
    # FlopCounterMode counts two FLOPs per multiply-accumulate.
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters and buffers have shapes but no values.

    Raises
    ------
    UserError
        If the network holds something that refuses to be copied.
    """
    meta: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        meta[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(model, meta)
    except Exception as error:
        raise UserError(f"{type(model).__name__}: cannot be copied: {error}") from error
