"""Graphs of networks that ``torch.fx`` cannot trace, or not deep enough: by ``torch.export``, with the modules' names.

``torch.fx`` runs a forward pass without shapes, so it stops at ``if height % window``; and it takes
``nn.MultiheadAttention``, and functions that a library wraps, as one operation. ``torch.export`` runs the forward pass
for images of one size. Its graph knows functions and parameters only; here, what a layer computes becomes a call of the
layer again, so that a graph has one form, whoever made it.
"""

import io
import logging
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_unflatten

from rethink_prune.copying import copy_network
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError, first_line
from rethink_prune.seeds import seeded
from rethink_prune.surgery.function_rules import RULES_BY_NAME
from rethink_prune.surgery.graph import (
    OWN_TENSORS,
    SETS_ATTRIBUTES,
    autograd_functions_run,
    check_own_forward,
    have_same_calls,
    hidden_steps,
    keep_constants,
    mark_unrecorded,
    operation_name,
    retrace,
    told_of_tracing,
    trace,
    unrecorded,
)

# Modules of torch that are made of layers.
_COMPOSED = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
# Neither 1, which torch would take for a constant, nor a likely size of anything else.
_BATCH = 3


@dataclass(frozen=True)
class Graphs:
    """What a network runs in each mode.

    Attributes
    ----------
    evaluation : fx.Graph
    training : fx.Graph or None
        None if training mode cannot be traced.
    network, training_network : nn.Module
        The copies `cost.on_meta` that were traced.
    exported : bool
        Whether ``torch.export`` made the graphs: a pruned network runs them, for images of this size.
    differ : bool
        Whether the two modes run different operations.
    warnings : tuple of str
        What could not be traced.
    """

    evaluation: fx.Graph
    training: fx.Graph | None
    network: nn.Module
    training_network: nn.Module
    exported: bool = False
    differ: bool = False
    warnings: tuple[str, ...] = ()


def trace_modes(model: nn.Module, input_shape: tuple[int, ...], *, exported: bool | None = None) -> Graphs:
    """Trace both modes of a network, by ``torch.fx`` if that shows all layers, or else by ``torch.export``.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    input_shape : tuple of int
        Batch dimension included.
    exported : bool, optional
        Take one of the two in any case.

    Raises
    ------
    UserError
        If neither can follow the network.

    Examples
    --------
    >>> trace_modes(nn.Sequential(nn.Linear(2, 1)), (1, 2)).exported
    False
    """
    check_own_forward(model)
    # The tracer puts constants into what it traces, so each trace has a copy.
    failure = traced = None
    if not exported:
        try:
            traced = _trace_both(model)
        except UserError as error:
            failure = error
    if traced is not None and (exported is False or not hides_layers(traced.evaluation, dict(model.named_modules()))):
        return traced
    network, training_network = on_meta(model), on_meta(model)
    try:
        # A network that keeps values between passes could not be exported otherwise.
        with told_of_tracing():
            evaluation = export_graph(network, input_shape)
        training = export_graph(training_network, input_shape, training=True)
    except UserError as error:
        if traced is not None:
            return traced
        if failure is not None:
            raise UserError(f"{failure}; {str(error).partition(': ')[2]}") from error
        raise
    return _compare(Graphs(evaluation, training, network, training_network, exported=True), model)


def _compare(graphs: Graphs, model: nn.Module) -> Graphs:
    """Tell whether the modes differ; rename tensors that the forward pass creates in both by the same names."""
    if graphs.training is None or have_same_calls(graphs.evaluation, graphs.training):
        return graphs
    for node in graphs.training.nodes:
        if node.op == "get_attr" and not _has(model, node.target):
            tensor = getattr(graphs.training_network, node.target)
            node.target = f"training_{node.target}"
            graphs.training_network.register_buffer(node.target, tensor, persistent=False)
    return replace(graphs, differ=True)


def _trace_both(model: nn.Module) -> Graphs:
    network, training_network = on_meta(model), on_meta(model)
    evaluation = trace(network)
    if unrecorded(evaluation) == SETS_ATTRIBUTES:
        network = on_meta(model)
        with told_of_tracing():
            evaluation = trace(network)
    try:
        training = trace(training_network, training=True)
        return _compare(Graphs(evaluation, training, network, training_network), model)
    except UserError as error:
        warning = f"only evaluation mode was followed; in training mode, {error}"
        return Graphs(evaluation, None, network, training_network, warnings=(warning,))


def hides_layers(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a trace has layers or products inside of one operation, which an exported graph would show.

    Examples
    --------
    >>> from rethink_prune.surgery.graph import trace
    >>> model = nn.TransformerEncoderLayer(8, 2)
    >>> hides_layers(trace(nn.Sequential(model)), {"0": model})
    True
    """
    if unrecorded(graph) == OWN_TENSORS:
        return True
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], _COMPOSED):
            return True
        if node.op == "call_function" and _is_wrapped(node):
            return True
    return False


def _is_wrapped(node: fx.Node) -> bool:
    """Tell whether a library has a function of its own taken as one operation."""
    home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    # Autograd functions are bound methods, and their backward pass is their own.
    own = home in ("torch", "_operator", "builtins", "math") or hasattr(node.target, "__self__")
    return not own and operation_name(node) not in RULES_BY_NAME


def export_graph(model: nn.Module, input_shape: tuple[int, ...], *, training: bool = False) -> fx.Graph:
    """Return the operations of `model` for images of one size, in any number.

    Parameters
    ----------
    model : nn.Module
        A copy `cost.on_meta`; put into the mode given.
    input_shape : tuple of int
        Batch dimension included, whose size does not matter.
    training : bool
        Which of the two modes to follow.

    Raises
    ------
    UserError
        If ``torch.export`` cannot follow it.

    Examples
    --------
    >>> class Cropped(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 3)
    ...     def forward(self, x):
    ...         return self.layer(x) if x.shape[-1] == 2 else x
    >>> [(node.op, node.target) for node in export_graph(Cropped().to("meta"), (1, 2)).nodes]
    [('placeholder', 'x'), ('call_module', 'layer'), ('output', 'output')]
    """
    model.train(training)
    name, known = type(model).__name__, [*model.parameters(), *model.buffers()]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    shape = (_BATCH, *input_shape[1:])
    try:
        try:
            exported, hidden = _export_program(model, torch.empty(shape, dtype=dtype, device="meta"))
        except RuntimeError:  # tensors that a forward pass creates on the CPU cannot meet meta tensors
            with_memory = copy_network(model).to_empty(device="cpu")
            exported, hidden = _export_program(with_memory, torch.empty(shape, dtype=dtype))
    except Exception as error:  # a forward pass may do anything that cannot be followed
        raise UserError(f"{name}: torch.export cannot follow it: {first_line(error)}") from error
    program = exported.module()
    if any(isinstance(node.target, HigherOrderOperator) for node in program.graph.nodes):
        hidden.append("runs parts without gradients, in another precision or as values decide")
    if hidden:
        raise UserError(f"{name}: its forward pass {hidden[0]}, which torch.export does not record")
    # A graph of its own may call modules that the program does not have.
    graph = fx.Graph()
    values = graph.graph_copy(program.graph, {})
    graph.output(tree_unflatten(tree_leaves(values), exported.call_spec.out_spec))
    image = next(node for node in graph.nodes if node.op == "placeholder")
    if isinstance(image.meta["val"].shape[0], int):
        raise UserError(f"{name}: runs batches of one size only, so torch.export cannot follow it")
    for node in list(graph.nodes):
        # Checks of sizes and types: the former hold for any input that fits, and types may change (to float64, say).
        if node.op == "call_module" or (node.op == "call_function" and operation_name(node) in _CHECKS):
            graph.erase_node(node)
    for call in _nodes_of_layers(graph, model):
        _restore_call(graph, call)
    for node in list(graph.nodes):
        _write_as_index(graph, node)
        _follow_device(graph, node, image)
    # Operations that write into a tensor stay, as do inputs and the result.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))
    keep_constants(model, program, graph)
    # Traced once more, nodes have the names that they have whenever this graph is traced again.
    runnable = fx.GraphModule(model, graph)
    result = retrace(runnable)
    keep_constants(model, runnable, result)
    constants = [operator.attrgetter(str(node.target))(model) for node in result.nodes if node.op == "get_attr"]
    own = {id(tensor) for tensor in known}
    if any(isinstance(c, torch.Tensor) and c.is_meta and id(c) not in own for c in constants):
        raise UserError(f"{name}: computes a tensor of its own that torch.export does not keep")
    mark_unrecorded(result, "")
    return result


def _export_program(model: nn.Module, images: torch.Tensor) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Return what torch makes of a forward pass, and what this does beside operations on tensors."""
    sizes = ({0: torch.export.Dim.AUTO},)
    with _nothing_printed(), seeded(0), hidden_steps(model) as hidden, autograd_functions_run(_refuse):
        program = torch.export.export(model, (images,), dynamic_shapes=sizes, strict=False)
    return program, hidden


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keep back what torch logs and prints of a graph that it gives up: the error says why."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Refuse a function with a backward pass of its own: an exported graph would have another."""
    raise UserError(f"{cls.__name__} has a backward pass of its own")


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(node.is_impure())


def _has(model: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def _nodes_of_layers(graph: fx.Graph, model: nn.Module) -> Iterable[tuple[str, list[fx.Node]]]:
    """Return the calls of layers, each with the nodes that it consists of."""
    calls: list[tuple[str, list[fx.Node]]] = []
    last: object = None
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        # From the network to the innermost module; a module that runs twice has a mark in its key.
        stack = [(key, place.split("@")[0]) for key, (place, _) in node.meta.get("nn_module_stack", {}).items()]
        layer = next((entry for entry in stack if _is_layer(model, entry[1])), None)
        if layer is not None and layer == last:
            calls[-1][1].append(node)
        elif layer is not None:
            calls.append((layer[1], [node]))
        last = layer
    return calls


def _is_layer(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:  # the mark of what stands outside of all modules
        return False
    of_torch = type(module).__module__.startswith("torch.nn") and not isinstance(module, (nn.Sequential, *_COMPOSED))
    return path != "" and (isinstance(module, _BatchNorm) or of_torch)


def _restore_call(graph: fx.Graph, call: tuple[str, list[fx.Node]]) -> None:
    """Replace the operations of one layer by a call of it, if they have one input and one result."""
    path, nodes = call
    inside = set(nodes)
    inputs = {source for node in nodes for source in node.all_input_nodes if source not in inside}
    inputs = {source for source in inputs if source.op != "get_attr"}
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(inputs) != 1 or len(results) != 1 or not isinstance(results[0].meta.get("val"), torch.Tensor):
        return
    with graph.inserting_after(nodes[-1]):
        layer = graph.call_module(path, (inputs.pop(),))
    layer.meta = results[0].meta
    results[0].replace_all_uses_with(layer)
    for node in reversed(nodes):
        graph.erase_node(node)


def _follow_device(graph: fx.Graph, node: fx.Node, image: fx.Node) -> None:
    """Let an operation create tensors where the images are, instead of where the copy was that was followed."""
    written = (*node.args, *node.kwargs.values())
    if any(isinstance(value, torch.device) for value in written):
        with graph.inserting_before(node):
            device = graph.call_function(getattr, (image, "device"))
        node.args = tuple(device if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {k: device if isinstance(value, torch.device) else value for k, value in node.kwargs.items()}


def _write_as_index(graph: fx.Graph, node: fx.Node) -> None:
    """Write ``select`` and ``slice`` as indexing, the form that a trace has."""
    if node.target not in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor):
        return
    numbers: list[Any] = list(node.args[1:])
    source: Any = node.args[0]
    dim, ndim = numbers[0] if numbers else 0, source.meta["val"].ndim
    item: Any
    if node.target is torch.ops.aten.select.int:
        item = numbers[1]
    else:
        start, stop, step = (numbers[place] if place < len(numbers) else None for place in (1, 2, 3))
        item = slice(start or None, None if stop == sys.maxsize else stop, step)
    index = (*[slice(None)] * (dim % ndim), item)
    with graph.inserting_before(node):
        indexed = graph.call_function(operator.getitem, (source, index))
    indexed.meta = node.meta
    node.replace_all_uses_with(indexed)
    graph.erase_node(node)
