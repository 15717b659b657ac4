"""Removing residual branches: what a branch was added to remains."""

import operator
from collections.abc import Mapping, Sequence, Set

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rethink_prune.copying import copy_network
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.graph import (
    keep_constants,
    operation_name,
    overwrites_operand,
    run_graph,
    trace,
    why_uneditable,
)


def remove_branches(model: nn.Module, ends: Sequence[str]) -> nn.Module:
    """Return a copy of a residual network without some branches.

    Parameters
    ----------
    model : nn.Module
        Stays as it is.
    ends : sequence of str
        The last module of each branch: what it returns reaches an addition; see `branch_addition`.

    Returns
    -------
    torch.nn.Module
        Without the modules and parameters that only these branches used; the state-dict keys of the others stay.

    Raises
    ------
    UserError
        If a module ends no branch, if a branch cannot go without changing what remains, or if its
        trace is not all that the network runs.

    Examples
    --------
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.branch = nn.Linear(3, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return x + self.branch(x)
    >>> list(remove_branches(Residual(), ["branch"]).state_dict())
    ['stem.weight', 'stem.bias']
    """
    model = copy_network(model)
    network, shapes = type(model).__name__, on_meta(model)
    # The result runs one graph in both modes.
    graph = trace(shapes, training=True)
    if reason := why_uneditable(trace(on_meta(model)), graph):
        raise UserError(f"{network}: no block can be removed: {reason}")
    modules = dict(shapes.named_modules())
    additions: dict[fx.Node, tuple[str, fx.Node]] = {}
    for end in ends:
        addition, other = branch_addition(graph, shapes, end)
        if addition in additions:
            raise UserError(f"{network}: {additions[addition][0]} and {end} end in one addition; one has to remain")
        additions[addition] = end, other
    used_before = _used_names(graph)
    # Calls whose result nobody reads run today; they and their parameters stay. So do inputs and the output.
    unread_before = {node for node in graph.nodes if not node.users or node.op == "placeholder"}
    # The last one first: what remains of it may be the sum that an earlier one ends in.
    for addition in [node for node in reversed(graph.nodes) if node in additions]:
        if not addition.users:
            continue  # it ran inside a branch that is gone by now
        end, remaining = additions[addition]
        if not all(_makes_new_tensor(user, modules) for user in addition.users):
            # The sum was a tensor of its own; a reader that overwrites it (in-place ReLU) must not reach the shortcut.
            with graph.inserting_before(addition):
                remaining = graph.call_method("clone", (remaining,))
        addition.replace_all_uses_with(remaining)
        graph.erase_node(addition)
        for node in _erase_unread(graph, unread_before, modules):
            problem = f"its branch cannot be removed, because it overwrites {node.name}, which others read"
            raise UserError(f"{network}: {end}: {problem}")
    result = run_graph(keep_constants(model, shapes, graph), graph)
    for name in sorted(used_before - _used_names(graph), reverse=True):  # what a module holds before the module
        owner, _, attribute = name.rpartition(".")
        if hasattr(result.get_submodule(owner), attribute):  # not so for constants that only the tracer knows
            delattr(result.get_submodule(owner), attribute)
    return result


def branch_addition(graph: fx.Graph, model: nn.Module, end: str) -> tuple[fx.Node, fx.Node]:
    """Return the addition that a residual branch ends in, and its other operand.

    Parameters
    ----------
    graph : fx.Graph
        A trace of `model`.
    model : nn.Module
    end : str
        Name of the branch's last module.

    Raises
    ------
    UserError
        If what the module returns does not reach an addition of two tensors through operations on it alone.

    Examples
    --------
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.branch = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x + self.branch(x).relu()
    >>> model = Residual()
    >>> branch_addition(trace(model), model, "branch")
    (add, x)
    """
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == end]
    problem = f"{type(model).__name__}: {end} does not end a residual branch"
    if len(nodes) != 1:
        raise UserError(f"{problem}: it is called {len(nodes)} times")
    node = nodes[0]
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise UserError(f"{problem}: its result has {len(users)} readers")
        before, node = node, users[0]
        if is_addition(node):
            (other,) = (operand for operand in node.all_input_nodes if operand is not before)
            return node, other
        if len(node.all_input_nodes) != 1 or node.op == "output":
            raise UserError(f"{problem}: it is read by {node.name}")


def is_addition(node: fx.Node) -> bool:
    """Tell whether a node is the plain sum of two values (``alpha`` of ``torch.add`` would scale one of them).

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x, y = graph.placeholder("x"), graph.placeholder("y")
    >>> is_addition(graph.call_function(torch.add, (x, y))), is_addition(graph.call_function(torch.add, (x, 1)))
    (True, False)
    """
    called = node.op in ("call_function", "call_method") and "alpha" not in node.kwargs
    return called and operation_name(node) == "add" and len(node.all_input_nodes) == 2


def _used_names(graph: fx.Graph) -> set[str]:
    """Return the names of the modules and tensors that a graph uses."""
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def _makes_new_tensor(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node surely leaves its operands alone, and returns no view of them."""
    # A view would pass on the shortcut's memory to a later operation that works in place.
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (_ConvNd, _BatchNorm, nn.Linear))
    return node.op == "call_function" and node.target in (operator.add, torch.add)


def _erase_unread(graph: fx.Graph, kept: Set[fx.Node], modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Erase what nobody reads, but for `kept`; return what remains but was overwritten by something erased."""
    overwritten = {
        node: node.all_input_nodes[0]
        for node in reversed(graph.nodes)
        if node.all_input_nodes and overwrites_operand(node, modules)
    }
    graph.eliminate_dead_code(kept.__contains__)
    remaining = set(graph.nodes)
    return [operand for node, operand in overwritten.items() if node not in remaining and operand in remaining]
