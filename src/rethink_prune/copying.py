"""Copies of networks, also of those that hold what Python's own deep copy refuses or would share by mistake."""

import copy
import types
from typing import Any

import torch
from torch import nn

from rethink_prune.errors import UserError, first_line

# What nn.Module itself keeps in an instance, hooks included.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# What can always be copied.
_PLAIN = (bool, int, float, str, type(None), types.FunctionType, torch.Tensor, nn.Module)


def copy_network(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a network.

    Beyond ``copy.deepcopy``: weights that a hook computes anew in every forward pass (``torch.nn.utils.weight_norm``)
    are copied as values; functions kept in an instance (hooks, a replaced ``forward``) that hold modules of the network
    hold those of the copy; and what cannot be copied (a lock, an open file) is shared with the copy.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    memo : dict, optional
        Copies that are there already, by the `id` of what they are copies of, as for ``copy.deepcopy``.

    Raises
    ------
    UserError
        If the network refuses to be copied.

    Examples
    --------
    >>> model = torch.nn.utils.weight_norm(nn.Linear(2, 1))
    >>> copy_network(model)(torch.zeros(1, 2)).shape
    torch.Size([1, 1])
    """
    memo = {} if memo is None else memo
    for tensor in derived(model):
        memo.setdefault(id(tensor), tensor.detach().clone())
    for module in model.modules():
        for name in uncopyable_attributes(module):
            memo[id(vars(module)[name])] = vars(module)[name]
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:  # the network's own __deepcopy__ may raise anything
        raise UserError(f"{type(model).__name__}: cannot be copied: {first_line(error)}") from error
    for module in result.modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        tables: tuple[dict[Any, Any], ...] = (vars(module), *hooks)
        for table in tables:
            for key, value in table.items():
                if isinstance(value, types.FunctionType) and value.__closure__:
                    table[key] = _rebind(value, memo)
    return result


def derived(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors that modules hold beside parameters and buffers and that were computed from these.

    Examples
    --------
    >>> [tuple(tensor.shape) for tensor in derived(torch.nn.utils.weight_norm(nn.Linear(2, 1)))]
    [(1, 2)]
    """
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if isinstance(value, torch.Tensor) and not value.is_leaf]


def uncopyable_attributes(module: nn.Module) -> list[str]:
    """Return the names of a module's own attributes that refuse to be copied.

    Examples
    --------
    >>> import threading
    >>> module = nn.ReLU()
    >>> module.lock, module.limit = threading.Lock(), 6
    >>> uncopyable_attributes(module)
    ['lock']
    """
    own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
    return [name for name, value in own.items() if not isinstance(value, _PLAIN) and not _can_copy(value)]


def _can_copy(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _rebind(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return the same function holding copies of what it holds."""
    # deepcopy takes functions as they are: a forward that calls the module's former forward would go on with the
    # weights of the network that was copied.
    cells = []
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, types.FunctionType) and held.__closure__:
            cells.append(types.CellType(_rebind(held, memo)))
        elif isinstance(held, nn.Module | torch.Tensor | types.MethodType | list | tuple | dict):
            cells.append(types.CellType(copy.deepcopy(held, memo)))
        else:
            cells.append(cell)
    rebound = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound
