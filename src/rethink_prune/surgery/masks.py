"""Boolean masks: single weights that are gone, in tensors that keep their shape.

``torch.nn.utils.prune`` is not used: it renames the keys of the state dict, and a network that has it cannot be copied.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

Masks = Mapping[str, torch.Tensor]


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> apply_masks(layer, {"weight": torch.tensor([[False, True]])})
    >>> layer.weight == 0
    tensor([[ True, False]])
    """
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

    Examples
    --------
    >>> layer = nn.Conv2d(1, 1, 2, bias=False)
    >>> draw_masked(layer, {"weight": torch.tensor([[[[True, False], [True, True]]]])})
    >>> layer.weight != 0
    tensor([[[[ True, False],
              [ True,  True]]]])
    """
    # Sorted, because masks that were stored come back in another order, and each draw moves the generator on.
    for name in sorted(masks):
        parameter = model.get_parameter(name)
        if parameter.ndim > 2:
            fan_out = int(masks[name].sum()) / parameter.shape[1]
            nn.init.normal_(parameter, 0.0, math.sqrt(2.0 / fan_out))
    apply_masks(model, masks)
