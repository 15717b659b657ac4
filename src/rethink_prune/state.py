"""All tensors of a network: its state dict, and the buffers that a state dict leaves out; and what it computes."""

import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rethink_prune.copying import OF_EVERY_MODULE
from rethink_prune.outputs import main_output
from rethink_prune.seeds import seeded
from rethink_prune.surgery.architecture import SELECTED, selects


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict together with its buffers that are not persistent.

    Without these, a network whose forward pass reads such a buffer would compute something else when it is loaded.
    Selections are no part of it: they belong to the architecture.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.register_buffer("scale", model.weight.new_ones(1), persistent=False)
    >>> list(full_state(model))
    ['weight', 'scale']
    """
    return {**model.state_dict(), **_temporary_buffers(model)}


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of `full_state`, which later changes of the network leave alone.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> before = copied_state(model)
    >>> nn.init.constant_(model.weight, before["weight"].item() + 1) == before["weight"]
    tensor([[False]])
    """
    return {name: tensor.clone() for name, tensor in full_state(model).items()}


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `full_state` returned; buffers that are not persistent may be missing.

    Raises
    ------
    RuntimeError
        As ``load_state_dict`` does.
    """
    buffers = _temporary_buffers(model)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in buffers})
    for name, buffer in buffers.items():
        if name in state:
            buffer.copy_(state[name])


@torch.no_grad()
def sample_logits(model: nn.Module, image_shape: Sequence[int]) -> Tensor:
    """Return a network's logits, in evaluation mode, for four random images that are always the same.

    A stage keeps them, so that whoever loads its network can see that it computes what it did.

    Examples
    --------
    >>> sample_logits(nn.Flatten(), (1, 2, 2)).shape
    torch.Size([4, 4])
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    with seeded(0):
        logits = main_output(model.eval()(images)).float().cpu()
    model.train(was_training)
    return logits


def overlapping(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the first tensors found that use the same memory; one name if a tensor uses some twice.

    Examples
    --------
    >>> weight = torch.zeros(2, 2)
    >>> overlapping({"first": weight[0], "second": weight[1]}), overlapping({"all": weight, "second": weight[1]})
    ([], ['all', 'second'])
    """
    by_storage: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            by_storage[tensor.untyped_storage().data_ptr()].append(name)
    for names in by_storage.values():
        if len(names) == 1 and tensors[names[0]].is_contiguous():
            continue
        # How often each number in the storage is used.
        tensor = tensors[names[0]]
        uses = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=torch.int64)
        for name in names:
            tensor = tensors[name]
            places = torch.arange(len(uses)).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            uses.index_add_(0, places.flatten(), torch.ones(tensor.numel(), dtype=torch.int64))
            if uses.max() > 1:
                return [*names[: names.index(name)][:1], name]
    return []


def remembered(model: nn.Module) -> dict[str, Any]:
    """Return the values that modules and their classes keep outside of state dicts: numbers, tensors, generators.

    Examples
    --------
    >>> model = nn.ReLU()
    >>> model.steps = 3
    >>> remembered(model)["steps"]
    3
    """
    found = {}
    for prefix, module in model.named_modules():
        own = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
        values = {key: value for kind in [*reversed(own)] for key, value in vars(kind).items() if kind is not object}
        values |= {key: value for key, value in vars(module).items() if key not in OF_EVERY_MODULE}
        for key, value in values.items():
            if not key.startswith("__"):
                found[f"{prefix}.{key}".removeprefix(".")] = _snapshot(value)
    return found


def _snapshot(value: Any, depth: int = 3) -> Any:
    """Return a copy that can be compared with `same_value`; None for what cannot."""
    match value:
        case bool() | int() | float() | complex() | str():
            return value
        case Tensor():
            return value.detach().clone()
        case torch.Generator():
            return value.get_state()
        case np.random.Generator():
            return str(value.bit_generator.state)
        case np.random.RandomState():
            return str(value.get_state())
        case random.Random():
            return str(value.getstate())
        case np.ndarray():
            return value.tolist()
        case Mapping() if depth:
            return [(str(key), _snapshot(item, depth - 1)) for key, item in value.items()]
        case list() | tuple() | deque() if depth:
            return [_snapshot(item, depth - 1) for item in value]
    return None


def same_value(first: Any, second: Any) -> bool:
    """Tell whether two values are the same; a NaN is itself.

    Examples
    --------
    >>> same_value([torch.tensor(float("nan")), 1], [torch.tensor(float("nan")), 1])
    True
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype or first.is_meta:
            return first.is_meta and second.is_meta
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_value(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_value, first, second))
    return bool(first == second or (first != first and second != second))


def _temporary_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}".removeprefix("."): module.get_buffer(name)
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None and not (name == SELECTED and selects(module))
    }
