"""What a network costs: parameters, multiply-accumulates, seconds and memory.

Conventions:

- MACs are those of convolutions, linear layers and products of matrices, such as attention's, for one image. A
  multiply-accumulate counts once; one with a masked weight does not count.
- Parameters are all that the network has, those of no layer (class tokens, embeddings, scales) included.
- Training costs 6 FLOPs per MAC and image: two for the forward pass, four for the backward pass. A teacher costs two.
- A forward pass is timed from its call until its logits are computed, alone, on images that are on the device already.
- A masked weight is a zero in a tensor of full size: it takes the time and the memory of any other number.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rethink_prune.copying import copy_network, derived
from rethink_prune.errors import UserError, first_line
from rethink_prune.seeds import seeded

TRAIN_FLOPS_PER_MAC = 6
FORWARD_FLOPS_PER_MAC = 2
# As a tensor operation, what a linear layer does; products of queries, keys and values are other ones.
_PROJECTIONS = (torch.ops.aten.mm, torch.ops.aten.addmm)
Forward = Callable[[torch.Tensor], object]
_WARM_UP_PASSES = 3
_TURN_SECONDS = 0.2
_MOST_PASSES_PER_TURN = 100


@dataclass(frozen=True)
class Cost:
    """What a network costs: `params`, and `macs` per image.

    Examples
    --------
    >>> Cost(params=853018, macs=125485696).train_flops(images=50_000)
    37645708800000
    """

    params: int
    macs: int

    def train_flops(self, images: int) -> int:
        """Return the FLOPs of training on `images` images (each epoch counts its images again)."""
        return TRAIN_FLOPS_PER_MAC * self.macs * images

    def forward_flops(self, images: int) -> int:
        """Return the FLOPs of a forward pass of `images` images."""
        return FORWARD_FLOPS_PER_MAC * self.macs * images


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

    Modules without any do not appear. A linear layer that is not called, because its parent multiplies with its weight,
    has a share of the parent's: the output projection of `nn.MultiheadAttention`, both of torchvision's Swin.

    Examples
    --------
    >>> layer_macs(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2))
    {'1': 60, '': 60}
    """
    # Torch's counter fails where a view of a parameter enters a module, if the parameter asks for a gradient.
    shapes = on_meta(model).eval().requires_grad_(False)
    try:
        counter = _count_flops(shapes, input_shape, "meta")
    except Exception:  # a forward pass may create tensors on the CPU, or read values
        shapes = shapes.to_empty(device="cpu")
        for tensor in [*shapes.parameters(), *shapes.buffers()]:
            tensor.detach().zero_()
        counter = _count_flops(shapes, input_shape, "cpu")
    prefix = f"{type(shapes).__name__}."
    counts = counter.get_flop_counts()
    operations = {name.removeprefix(prefix): found for name, found in counts.items() if name.startswith(prefix)}
    operations[""] = counts.get(prefix[:-1], {})
    # FlopCounterMode counts two FLOPs per multiply-accumulate.
    macs = {name: sum(found.values()) // 2 for name, found in operations.items() if found}
    projections = {name: sum(found.get(o, 0) for o in _PROJECTIONS) // 2 for name, found in operations.items()}
    for name, module in shapes.named_modules():
        children = {_member(name, key): child for key, child in module.named_children()}
        uncalled = {n: child.weight for n, child in children.items() if isinstance(child, nn.Linear) and n not in macs}
        own = projections.get(name, 0) - sum(projections.get(child, 0) for child in children)
        if uncalled and own:
            total = sum(map(torch.numel, [*uncalled.values(), *input_projections(module).values()]))
            macs |= {child: own * weight.numel() // total for child, weight in uncalled.items()}
    return {**macs, "": counter.get_total_flops() // 2}


def _member(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def input_projections(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that make queries, keys and values in `nn.MultiheadAttention`, by name: one for all, or three.

    Examples
    --------
    >>> [*input_projections(nn.MultiheadAttention(8, 2))], [*input_projections(nn.MultiheadAttention(8, 2, kdim=4))]
    (['in_proj_weight'], ['q_proj_weight', 'k_proj_weight', 'v_proj_weight'])
    """
    if not isinstance(module, nn.MultiheadAttention):
        return {}
    return {name: weight for name, weight in module.named_parameters(recurse=False) if name.endswith("_proj_weight")}


def _count_flops(model: nn.Module, input_shape: Sequence[int], device: str) -> FlopCounterMode:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    # Attention of torch has a short way for evaluation, whose products are not counted.
    short_way = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), seeded(0), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_shape, dtype=dtype, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(short_way)
    return counter


def weight_macs(model: nn.Module, macs: Mapping[str, int]) -> dict[str, int]:
    """Return the MACs of each weight by its name, from those of :func:`layer_macs`; layers may share a weight.

    Examples
    --------
    >>> weight_macs(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), {"1": 60, "": 60})
    {'1.weight': 60}
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts: dict[str, int] = {}
    for layer, module in model.named_modules():
        name = names.get(id(getattr(module, "weight", None)))
        if name is not None:
            counts[name] = counts.get(name, 0) + macs.get(layer, 0)
        for weight in input_projections(module).values():  # every token passes all projections
            output: Any = module.out_proj
            share = macs.get(_member(layer, "out_proj"), 0) * weight.numel() // output.weight.numel()
            counts[names[id(weight)]] = counts.get(names[id(weight)], 0) + share
    return counts


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters and buffers have shapes but no values.

    Raises
    ------
    UserError
        If the network holds something that refuses to be copied.

    Examples
    --------
    >>> on_meta(nn.Linear(2, 1)).weight.device
    device(type='meta')
    """
    # Of what is in the memo no values are copied, and shared tensors stay shared.
    try:
        meta: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in [*model.buffers(), *derived(model)]}
        meta |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    except Exception as error:  # a lazy layer has no shape yet
        raise UserError(f"{type(model).__name__}: cannot be copied: {first_line(error)}") from error
    return copy_network(model, meta)


@torch.no_grad()
def output_sizes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the spatial size of each module's output, where that is one tensor; of the first where it is used often.

    Of a linear layer that reads tokens, it is how many tokens there are.

    Parameters
    ----------
    model : torch.nn.Module
        Run without values, as a copy.
    input_shape : sequence of int
        Channels, height and width of one image.

    Raises
    ------
    UserError
        If it cannot be copied, or run without values.

    Examples
    --------
    >>> output_sizes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (3, 8, 8))
    {'0': (6, 6), '1': (), '': ()}
    >>> output_sizes(nn.Sequential(nn.Flatten(2), nn.Linear(64, 5)), (3, 8, 8))["1"]
    (3,)
    """
    sizes: dict[str, tuple[int, ...]] = {}
    shapes = on_meta(model)

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                # The features of a linear layer come last: before them are tokens, if it reads any.
                sizes.setdefault(name, tuple(output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:]))

        return hook

    for name, module in shapes.named_modules():
        module.register_forward_hook(record(name))
    try:
        shapes.eval()(torch.zeros(1, *input_shape, device="meta"))
    except Exception as error:  # a forward pass may read values, which meta tensors lack
        raise UserError(f"{type(model).__name__}: cannot be run without values: {first_line(error)}") from error
    return sizes


@torch.inference_mode()
def time_passes(models: Mapping[str, Forward], images: torch.Tensor, *, rounds: int) -> dict[str, list[float]]:
    """Time forward passes of networks that take turns: a machine that slows down slows all of them.

    Parameters
    ----------
    models : mapping of str to callable
        Networks in evaluation mode, on the device of `images`, with its type of numbers; or their recorded passes.
    images : torch.Tensor
        One batch, N x C x H x W.
    rounds : int
        In each round, every network has a turn: one pass that is not counted, then as many as take about a fifth of
        a second.

    Returns
    -------
    dict of str to list of float
        By network, seconds per pass: the median of every round.

    Examples
    --------
    >>> times = time_passes({"small": nn.Linear(2, 1)}, torch.zeros(1, 2), rounds=3)
    >>> len(times["small"])
    3
    """
    passes = {}
    for name, model in models.items():
        # The first passes choose kernels and fill the allocator's cache.
        for _ in range(_WARM_UP_PASSES):
            seconds = _time_pass(model, images)
        passes[name] = max(1, min(_MOST_PASSES_PER_TURN, int(_TURN_SECONDS / seconds)))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            # The pass that is not counted: it brings back into the caches what another network displaced.
            _time_pass(model, images)
            times[name].append(median(_time_pass(model, images) for _ in range(passes[name])))
    return times


@torch.inference_mode()
def pass_memory(model: nn.Module, images: torch.Tensor) -> int:
    """Return the largest number of bytes that a forward pass holds at once: weights, images and what is computed.

    On CUDA, what the allocator gave out, including the work space of kernels; on a CPU, the tensors alone.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, on the device of `images`.
    images : torch.Tensor
        One batch, N x C x H x W.

    Examples
    --------
    >>> pass_memory(nn.Linear(2, 1, bias=False), torch.zeros(5, 2))  # weight, images and logits in float32
    68
    """
    inputs = [*model.parameters(), *model.buffers(), images]
    # By storage, because tensors may share one.
    input_bytes = sum({_storage(t): t.untyped_storage().nbytes() for t in inputs}.values())
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        return input_bytes + torch.cuda.max_memory_allocated(images.device) - before
    with _LiveTensors({_storage(t) for t in inputs}) as live:
        model(images)
    return input_bytes + live.peak


class _LiveTensors(TorchDispatchMode):
    """Records the largest number of bytes alive in tensors that torch operations made.

    Tensors in the storages `ignored` do not count. An operation may return a view of them.
    """

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._ignored = ignored
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._ignored:
                storage = tensor.untyped_storage()
                self._alive[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _time_pass(model: Forward, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        # The call returns when the kernels are queued, not when they are done.
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
