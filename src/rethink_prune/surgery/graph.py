"""A network as a graph of operations, and the shape of every value in it without running a kernel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.errors import UserError

# Their output has their input's shape. Torch decomposes these on meta tensors in Python, which would take
# nine tenths of the time.
_SAME_SHAPE_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
)
_SAME_SHAPE_FUNCTIONS = (F.relu, torch.relu)


def select_inputs(module: nn.Module, indexes: torch.Tensor) -> None:
    """Make a module read only some channels of its input, which stays whole for its other readers.

    The indexes become the buffer ``selected``, which is no part of the state dict: they belong to the architecture. A
    hook instead of a wrapper keeps the module's class and the keys of its weights.

    Parameters
    ----------
    module : nn.Module
        A batch norm, convolution or linear layer for that many channels. Changed in place.
    indexes : torch.Tensor
        The channels (dimension 1) to read, in the order to read them: int64, shape ``(selected,)``.
    """
    if not selects(module):
        module.register_forward_pre_hook(_select)
    module.register_buffer("selected", indexes.to(torch.int64), persistent=False)


def selects(module: nn.Module) -> bool:
    """Tell whether `select_inputs` was applied to a module."""
    return isinstance(getattr(module, "selected", None), torch.Tensor)


def _select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].index_select(1, module.get_buffer("selected")), *args[1:])


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _BatchNorm) or super().is_leaf_module(module, qualified_name)


def trace(model: nn.Module, *, training: bool = False) -> fx.Graph:
    """Return the operations of `model`, with arguments that have a default fixed to it.

    Parameters
    ----------
    model : nn.Module
        Put into the mode given and possibly given constants by the tracer: pass a copy (`cost.on_meta`).
    training : bool
        Which of the two modes to trace.

    Raises
    ------
    UserError
        If ``torch.fx`` cannot trace it.
    """
    model.train(training)
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # a user's forward may raise anything when it is given proxies
        name, reason = type(model).__name__, _first_line(error)
        raise UserError(f"{name}: torch.fx cannot trace it, so its channels cannot be followed: {reason}") from error
    for node in graph.nodes:
        # One spelling for f(x) and f(input=x), so that whoever reads the graph need not know both.
        if "input" in node.kwargs and not node.args:
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}
    return graph


def evaluate(graph: fx.Graph, model: nn.Module, input_shape: tuple[int, ...]) -> dict[fx.Node, Any]:
    """Return the value of every node for an input of `input_shape`, as meta tensors.

    Parameters
    ----------
    graph : fx.Graph
        A trace of `model`, or of a copy with other widths.
    model : nn.Module
        A copy `cost.on_meta`, in evaluation mode.
    input_shape : tuple of int
        Batch dimension included.

    Raises
    ------
    UserError
        If an operation refuses its operands; names the module or the operation.
    """
    modules = dict(model.named_modules())
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    example = torch.empty(input_shape, dtype=next(floating, torch.get_default_dtype()), device="meta")
    values: dict[fx.Node, Any] = {}

    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return args[0] if args else example  # an argument of the placeholder is its default
        if node.op == "get_attr":
            return _attribute(model, str(node.target))
        if node.op == "call_module":
            module = modules[str(node.target)]
            if type(module) not in _SAME_SHAPE_MODULES or selects(module):
                return module(*args, **kwargs)
            if isinstance(module, _BatchNorm) and module.num_features != args[0].shape[1]:
                raise ValueError(f"expects {module.num_features} channels, got {args[0].shape[1]}")
            return args[0]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "output":
            return args[0]
        if node.target in _SAME_SHAPE_FUNCTIONS:
            return args[0]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    for node in graph.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        try:
            with torch.no_grad():
                value = compute(node, args, kwargs)
        except Exception as error:  # whatever an operation raises about its operands
            name = node.target if node.op == "call_module" else node.name
            given = ", ".join(str(tuple(arg.shape)) for arg in args if isinstance(arg, torch.Tensor))
            raise UserError(
                f"{type(model).__name__}: {name}: cannot take {given or 'this'}: {_first_line(error)}"
            ) from error
        # Tensors that a forward creates on the CPU cannot meet meta tensors.
        values[node] = value.to("meta") if isinstance(value, torch.Tensor) else value
    return values


def describe_call(node: fx.Node) -> str:
    """Return the call as text: what is called, with which constants."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    arguments = [repr(a) for a in node.args] + [f"{key}={value!r}" for key, value in node.kwargs.items()]
    return f"{target}({', '.join(arguments)})"


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
