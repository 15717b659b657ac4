"""A network as a graph of operations: tracing it, the shape of every value, what a node calls, running it again."""

import inspect
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.copying import OF_EVERY_MODULE
from rethink_prune.errors import UserError, first_line
from rethink_prune.seeds import seeded

# The output of these has the shape of the input. Torch decomposes them on meta tensors in Python, which would take
# nine tenths of the time of an analysis.
_SAME_SHAPE_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)
_SAME_SHAPE_FUNCTIONS = (F.relu, torch.relu)
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv")
# What a trace did not record, in the meta data of its first node.
_UNRECORDED = "unrecorded"
_DRAWS = "draws random numbers"
# How names begin that the tracer gives to tensors.
_CREATED = "_tensor_constant"
SETS_ATTRIBUTES = "sets attributes"
OWN_TENSORS = "computes with its tensors alone"
_ALIASES = {**{name: name[1:] for name in _IN_PLACE_OPERATORS}, "itruediv": "div", "truediv": "div", "multiply": "mul"}


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()
        self.changes_modes = False

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.changes_modes |= _modes() != self.modes
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # Subclasses of batch norm (timm has some with an activation inside) stay one call: their scale and shift
        # can be cut like any batch norm's, whatever else their forward does.
        return isinstance(module, _BatchNorm) or super().is_leaf_module(module, qualified_name)


class _BufferTracer(_Tracer):
    # What is computed from buffers alone stays in the graph, instead of being computed once, without values.
    proxy_buffer_attributes = True


def trace(model: nn.Module, *, training: bool = False, seed: int = 0) -> fx.Graph:
    """Return the operations of `model`, with arguments that have a default fixed to it.

    Parameters
    ----------
    model : nn.Module
        Put into the mode given and possibly given constants by the tracer: pass a copy (`cost.on_meta`).
    training : bool
        Which of the two modes to trace.
    seed : int
        Decides the random numbers that a forward pass may draw: what it runs may depend on them.

    Raises
    ------
    UserError
        If ``torch.fx`` cannot trace it.

    Examples
    --------
    >>> [node.name for node in trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).nodes]
    ['input_1', '_0', '_1', 'output']
    """
    check_own_forward(model)
    model.train(training)
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    tracer = _Tracer()
    try:
        # A forward pass that draws random numbers draws them while it is traced, too.
        with seeded(seed), _autograd_functions_as_calls(), hidden_steps(model) as hidden:
            graph = tracer.trace(model, concrete_args=defaults or None)
    except Exception as error:  # a user's forward may raise anything when it is given proxies
        name, reason = type(model).__name__, first_line(error)
        raise UserError(f"{name}: torch.fx cannot trace it, so its channels cannot be followed: {reason}") from error
    for node in graph.nodes:
        # One spelling for f(x) and f(input=x), so that readers of the graph need to know one only.
        if "input" in node.kwargs and not node.args:
            node.args = (node.kwargs["input"],)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}
    constants = [getattr(model, str(node.target), None) for node in graph.nodes if node.op == "get_attr"]
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    if tracer.changes_modes:
        hidden.append("runs parts without gradients or in another precision")
    if any(isinstance(c, torch.Tensor) and c.is_meta and id(c) not in own for c in constants):
        hidden.append(OWN_TENSORS)
    mark_unrecorded(graph, next(iter(hidden), ""))
    return graph


def check_own_forward(model: nn.Module) -> None:
    """Raise `UserError` if what a network runs is not the forward pass of its class."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"{type(model).__name__}: is a script, which torch.fx cannot trace; give the network itself")
    if "forward" in vars(model):
        raise UserError(f"{type(model).__name__}: its forward was replaced on the instance, which torch.fx ignores")


@contextmanager
def hidden_steps(model: nn.Module) -> Iterator[list[str]]:
    """Find out what a forward pass does beside operations on tensors; the list is filled when it has run.

    Examples
    --------
    >>> with hidden_steps(nn.Linear(2, 1)) as found:
    ...     numbers = torch.rand(1)
    >>> found
    ['draws random numbers']
    """
    held, before = _held_values(model), _random_states()
    found: list[str] = []
    yield found
    if _random_states() != before:
        found.append(_DRAWS)
    # The tracer itself adds the tensors that a forward pass creates.
    changed = {key for key, mark in _held_values(model).items() if held.get(key) != mark}
    if any(not key[1].startswith(_CREATED) for key in changed):
        found.append(SETS_ATTRIBUTES)


def mark_unrecorded(graph: fx.Graph, reason: str) -> None:
    """Keep what a trace did not record; see `unrecorded`."""
    next(iter(graph.nodes)).meta[_UNRECORDED] = reason


def retrace(module: fx.GraphModule) -> fx.Graph:
    """Return the graph of a module that runs a graph, as `trace` gives it."""
    return _BufferTracer().trace(module)


def _modes() -> tuple[bool, ...]:
    """Return what contexts such as ``torch.no_grad()`` and ``torch.autocast()`` decide."""
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _held_values(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return a mark for everything that modules hold, by module and name; whatever changes has another mark."""
    return {
        (name, key): _mark(value)
        for name, module in model.named_modules()
        for table in (vars(module), module._parameters, module._buffers)
        for key, value in table.items()
        if table is not vars(module) or key not in OF_EVERY_MODULE
    }


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    try:
        return pickle.dumps(value)
    except Exception:  # an object's own way of pickling may raise anything
        return id(value)


def _random_states() -> list[Any]:
    """Return the states of torch's, NumPy's and Python's global generators, to be compared."""
    numpy_state: Any = np.random.get_state()
    return [torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2:], random.getstate()]


def draws_numbers(graph: fx.Graph) -> bool:
    """Tell whether a forward pass drew random numbers while it was traced: another time, it may run something else.

    Examples
    --------
    >>> draws_numbers(trace(nn.Dropout()))  # drawn by an operation of the graph
    False
    """
    return unrecorded(graph) == _DRAWS


def unrecorded(graph: fx.Graph) -> str:
    """Return what a forward pass does beside the operations of its trace; empty if nothing is known.

    The graph cannot stand for such a forward pass.

    Examples
    --------
    >>> class Frozen(nn.Module):
    ...     def forward(self, x):
    ...         with torch.no_grad():
    ...             return x.relu()
    >>> unrecorded(trace(nn.ReLU())), unrecorded(trace(Frozen()))
    ('', 'runs parts without gradients or in another precision')
    """
    return str(next(iter(graph.nodes)).meta[_UNRECORDED])


@contextmanager
def autograd_functions_run(apply: Callable[..., Any]) -> Iterator[None]:
    """Let `apply`, which gets the class first, run in the place of autograd functions."""
    plain: Any = vars(torch.autograd.Function)["apply"]
    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = plain


def _autograd_functions_as_calls() -> AbstractContextManager[None]:
    """Let a trace have one call for an autograd function: its backward pass is not that of what its forward runs."""
    plain: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        function = plain.__get__(None, cls)
        proxies = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, fx.Proxy)]
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return autograd_functions_run(apply)


@contextmanager
def told_of_tracing() -> Iterator[None]:
    """Let ``torch.jit.is_tracing()`` be true: networks that keep values between passes compute them anew then."""
    plain = torch.jit.is_tracing
    torch.jit.is_tracing = lambda: True
    try:
        yield
    finally:
        torch.jit.is_tracing = plain


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph on meta tensors; errors say which module or operation refused its operands."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever an operation raises about its operands
            network, name = type(self.module).__name__, n.target if n.op == "call_module" else n.name
            args, _ = self.fetch_args_kwargs_from_env(n)
            given = ", ".join(str(tuple(arg.shape)) for arg in args if isinstance(arg, torch.Tensor)) or "this"
            raise UserError(f"{network}: {name}: cannot take {given}: {first_line(error)}") from error
        # Tensors that a forward pass creates on the CPU cannot meet meta tensors.
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.submodules[target]
        # With a hook (such as a selection of the input), the output may have another shape than the input.
        changed = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
        if type(module) not in _SAME_SHAPE_MODULES or changed:
            return module(*args, **kwargs)
        if isinstance(module, _BatchNorm) and module.num_features != args[0].shape[1]:
            raise ValueError(f"expects {module.num_features} channels, got {args[0].shape[1]}")
        return args[0]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if target in _SAME_SHAPE_FUNCTIONS else super().call_function(target, args, kwargs)


def infer_values(graph: fx.Graph, model: nn.Module, input_shape: tuple[int, ...]) -> dict[fx.Node, Any]:
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

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).to("meta")
    >>> values = infer_values(trace(model), model, (1, 3, 6, 6))
    >>> {node.name: tuple(value.shape) for node, value in values.items()}
    {'input_1': (1, 3, 6, 6), '_0': (1, 8, 4, 4), '_1': (1, 128), 'output': (1, 128)}
    """
    # Torch refuses to mix types, on meta tensors too, so the example has the type of the weights.
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    example = torch.empty(input_shape, dtype=next(floating, torch.get_default_dtype()), device="meta")
    interpreter = _ShapeInterpreter(model, garbage_collect_values=False, graph=graph)
    interpreter.extra_traceback = False  # it would add the trace to messages for users
    with torch.no_grad():
        interpreter.run(example, enable_io_processing=False)
    return interpreter.env


def describe_call(node: fx.Node) -> str:
    """Return the call as text: what is called, with which constants.

    Examples
    --------
    >>> [describe_call(node) for node in trace(nn.Flatten()).nodes][1]
    'flatten(input_1, 1, -1)'
    """
    arguments = [repr(a) for a in node.args] + [f"{key}={value!r}" for key, value in node.kwargs.items()]
    return f"{_target_name(node)}({', '.join(arguments)})"


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):  # aten.add.Tensor
        return node.target.overloadpacket.__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))


def why_uneditable(graph: fx.Graph, training_graph: fx.Graph | None, *, alike: bool = True) -> str:
    """Return why a network may not be replaced by its changed traces; empty if it may.

    Parameters
    ----------
    graph : fx.Graph
        The trace in evaluation mode.
    training_graph : fx.Graph, optional
        The one in training mode; None if there is none.
    alike : bool
        Whether one graph has to do for both modes.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> why_uneditable(trace(model), None)
    'training mode cannot be traced'
    """
    if training_graph is None:
        return "training mode cannot be traced"
    if alike and not have_same_calls(graph, training_graph):
        return "training and evaluation mode run different operations"
    reason = unrecorded(graph) or unrecorded(training_graph)
    return f"its forward pass {reason}, which a trace does not record" if reason else ""


def have_same_calls(first: fx.Graph, second: fx.Graph) -> bool:
    """Tell whether two graphs, such as those of the two modes of a network, run the same operations.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> have_same_calls(trace(model), trace(model, training=True))  # the module decides, not the graph
    True
    """
    calls = [[(node.name, describe_call(node)) for node in graph.nodes] for graph in (first, second)]
    return calls[0] == calls[1]


def operation_name(node: fx.Node) -> str:
    """Return the plain name of what a function or method node calls: ``x += y``, ``x.add_(y)`` are ``add``.

    Functions from elsewhere than torch are named by their module too, so that no rule takes them for torch's.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> operation_name(graph.call_method("add_", (x, 1))), operation_name(graph.call_function(describe_call, (x,)))
    ('add', 'rethink_prune.describe_call')
    """
    name = _target_name(node).rstrip("_")
    # The name of a method is text, which has no module.
    home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    elsewhere = home not in ("torch", "torchvision", "_operator", "builtins")
    return f"{home}.{name}" if elsewhere else _ALIASES.get(name, name)


def called_module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the module that a node calls; None if it is a function, a method, an input or the output.

    Examples
    --------
    >>> model = nn.Sequential(nn.ReLU())
    >>> [called_module(node, dict(model.named_modules())) for node in trace(model).nodes]
    [None, ReLU(), None]
    """
    return modules[str(node.target)] if node.op == "call_module" else None


def module_calls(graph: fx.Graph) -> Mapping[str, list[fx.Node]]:
    """Return the nodes that call each module, by its name.

    Examples
    --------
    >>> {name: len(nodes) for name, nodes in module_calls(trace(nn.Sequential(nn.ReLU(), nn.ReLU()))).items()}
    {'0': 1, '1': 1}
    """
    calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    return calls


def layer_calls(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """Return the nodes that call a layer, or a linear function with its weight.

    Examples
    --------
    >>> layer_calls(trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "0")
    [_0]
    """

    def reads(node: fx.Node) -> bool:
        if node.op == "call_module":
            return node.target == layer
        linear = node.op == "call_function" and operation_name(node) == "linear"
        weight = (node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")) if linear else None
        return isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == f"{layer}.weight"

    return [node for node in graph.nodes if reads(node)]


def overwrites_operand(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a call, of one of the modules or of a function, writes its result into its first operand.

    In-place ReLU and ``x += y`` change a tensor that others may read: they read the new values.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> [overwrites_operand(graph.call_method(name, (x,)), {}) for name in ("relu", "relu_")]
    [False, True]
    """
    module = called_module(node, modules)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = _target_name(node)
    return name.endswith("_") or name in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace"))


def keep_constants(model: nn.Module, traced: nn.Module, graph: fx.Graph) -> nn.Module:
    """Give a network the tensors that its forward pass creates, and return it; changed in place.

    Parameters
    ----------
    model : nn.Module
    traced : nn.Module
        The copy of it that was traced: the tracer put them there.
    graph : fx.Graph
        The trace.

    Examples
    --------
    >>> class Shift(nn.Module):
    ...     def forward(self, x):
    ...         return x + torch.tensor(2.0)
    >>> traced = Shift()
    >>> dict(keep_constants(Shift(), traced, trace(traced)).named_buffers())
    {'_tensor_constant0': tensor(2.)}
    """
    for node in graph.nodes:
        if node.op == "get_attr" and hasattr(traced, node.target) and not hasattr(model, node.target):
            model.register_buffer(node.target, getattr(traced, node.target), persistent=False)
    return model


def run_graph(model: nn.Module, graph: fx.Graph, training_graph: fx.Graph | None = None) -> nn.Module:
    """Return `model` with `graph` as its forward pass: of a class derived from its own, which keeps all else.

    Its own ``train()``, hooks, attributes, extra state and further methods stay, and so does ``isinstance``.

    Parameters
    ----------
    model : nn.Module
        The network with its weights; changed in place.
    graph : fx.Graph
        A changed trace of it, or of a copy. Reads no tensors but those that `model` has.
    training_graph : fx.Graph, optional
        What runs in training mode, if that is another graph.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> result = run_graph(model, trace(model))
    >>> isinstance(result, nn.Sequential), list(result.state_dict())
    (True, ['0.weight', '0.bias'])
    """
    # The graph's code reaches modules and tensors through the network it is a method of.
    own, evaluate = type(model), _forward(model, graph)
    if training_graph is None:
        forward = evaluate
    else:
        train = _forward(model, training_graph)

        def forward(self: nn.Module, *args: Any) -> Any:
            return train(self, *args) if self.training else evaluate(self, *args)

    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
    return model


def _forward(model: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    return vars(type(fx.GraphModule(model, graph)))["forward"]
