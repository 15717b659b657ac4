"""Parameters and multiply-accumulates of a network.

Conventions: MACs are those of convolutions and linear layers for one image, one multiply-accumulate counting once,
those with a masked weight not at all; training costs 6 FLOPs per MAC and image (two for the forward pass, four for the
backward pass).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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


def count_cost(
    model: nn.Module, input_shape: Sequence[int], *, masks: Mapping[str, torch.Tensor] | None = None
) -> Cost:
    """Count the parameters of `model` and the MACs of one image.

    Parameters
    ----------
    model : torch.nn.Module
        Any network; left as it is.
    input_shape : sequence of int
        Shape of one image, C x H x W.
    masks : mapping of str to torch.Tensor, optional
        By parameter name, True where a weight is not zero: only these are counted, as parameters and in MACs.

    Returns
    -------
    Cost

    Examples
    --------
    >>> from rethink_prune import build_model, count_cost
    >>> count_cost(build_model("resnet56"), (3, 32, 32))
    Cost(params=853018, macs=125485696)
    """
    macs = layer_macs(model, input_shape)
    macs_of = weight_macs(model, macs)
    cost = Cost(sum(p.numel() for p in model.parameters()), macs[""])
    for name, mask in (masks or {}).items():
        zeros = mask.numel() - int(mask.sum())
        # Every weight of a layer is used equally often.
        unused = macs_of.get(name, 0) * zeros // mask.numel()
        cost = Cost(cost.params - zeros, cost.macs - unused)
    return cost


def layer_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the MACs of one image in each module, its submodules included, by name; ``""`` is the whole network.

    Modules without any do not appear.
    """
    shapes = on_meta(model).eval()
    dtype = next((p.dtype for p in shapes.parameters() if p.is_floating_point()), None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, *input_shape, dtype=dtype, device="meta"))
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    prefix = f"{type(shapes).__name__}."
    # FlopCounterMode counts two FLOPs per multiply-accumulate.
    macs = {name.removeprefix(prefix): flops // 2 for name, flops in counts.items() if name.startswith(prefix)}
    return {**macs, "": counter.get_total_flops() // 2}


def weight_macs(model: nn.Module, macs: Mapping[str, int]) -> dict[str, int]:
    """Sort the MACs of each layer, from :func:`layer_macs`, by its weight's name: several layers may share one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts: dict[str, int] = {}
    for layer, module in model.named_modules():
        name = names.get(id(getattr(module, "weight", None)))
        if name is not None:
            counts[name] = counts.get(name, 0) + macs.get(layer, 0)
    return counts


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters and buffers have shapes but no values.

    Raises
    ------
    UserError
        If the network holds something that refuses to be copied.
    """
    meta: dict[int, object] = {}
    try:
        for tensor in [*model.parameters(), *model.buffers()]:
            empty = torch.empty_like(tensor, device="meta")
            meta[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(model, meta)
    except Exception as error:
        raise UserError(f"{type(model).__name__}: cannot be copied: {error}") from error
