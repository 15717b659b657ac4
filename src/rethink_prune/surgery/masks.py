"""Weights that are gone one by one: boolean masks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

Masks = Mapping[str, torch.Tensor]


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0.0)


@torch.no_grad()
def draw_masked(model: nn.Module, masks: Masks) -> None:
    """Draw the masked convolutions anew at a density-scaled fan-out, and set their masked weights to zero.

    N(0, sqrt(2 / n)) with ``n`` = remaining weights / C_in, as Liu et al. (2019) do for networks of any family: with
    nothing masked, ``n`` is the fan-out ``k k C_out``. Other masked parameters keep the values they have where they
    remain.

    Parameters
    ----------
    model : nn.Module
        Freshly initialised; changed in place. Draws from torch's global generator, in the order of the names.
    masks : mapping of str to torch.Tensor
        Each with at least one True.
    """
    for name in sorted(masks):
        parameter = model.get_parameter(name)
        if parameter.ndim > 2:
            fan_out = int(masks[name].sum()) / parameter.shape[1]
            nn.init.normal_(parameter, 0.0, math.sqrt(2.0 / fan_out))
    apply_masks(model, masks)
