"""Channel selections: a layer reads some channels of a stream that stays whole for its other readers.

A selection is a hook on the layer, not a module of its own: class and weight names of the layer stay, and a subclass of
batch norm keeps the activation it may have. It selects by ``index_select`` from a buffer, which ``torch.compile``
follows.
"""

from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.surgery.graph import operation_name

_SUFFIX = ".selected"


def select_inputs(module: nn.Module, indexes: torch.Tensor) -> None:
    """Make a module read only some channels of its input.

    The indexes become the buffer ``selected``, which is no part of the state dict: they belong to the architecture.

    Parameters
    ----------
    module : nn.Module
        A batch norm, convolution or linear layer for that many channels. Changed in place.
    indexes : torch.Tensor
        The channels (dimension 1) to read, in the order to read them: int64, shape ``(selected,)``.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> select_inputs(layer, torch.tensor([4, 0]))
    >>> layer(torch.zeros(1, 5)).shape
    torch.Size([1, 1])
    """
    # Pruned a second time, the module has the hook already.
    if not selects(module):
        module.register_forward_pre_hook(_read_selected)
    module.register_buffer("selected", indexes.to(torch.int64), persistent=False)


def selects(module: nn.Module) -> bool:
    """Tell whether `select_inputs` was applied to a module.

    Examples
    --------
    >>> selects(nn.Linear(2, 1))
    False
    """
    return isinstance(getattr(module, "selected", None), torch.Tensor)


def _read_selected(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0].index_select(1, module.get_buffer("selected")), *args[1:])


def selection_of(module: str) -> str:
    """Return the name of what a module selects from its input: that of the buffer with the indexes.

    Examples
    --------
    >>> selection_of("layer1.0.bn1")
    'layer1.0.bn1.selected'
    """
    return module + _SUFFIX


def selecting_module(name: str) -> str | None:
    """Return the module that a selection belongs to; None for the name of a layer.

    Examples
    --------
    >>> selecting_module("layer1.0.bn1.selected")
    'layer1.0.bn1'
    """
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def may_select(node: fx.Node, modules: Mapping[str, nn.Module], kind: str | None) -> bool:
    """Tell whether a module should select from what it reads: others read it too, or several layers write it.

    Parameters
    ----------
    node : fx.Node
        The call of a module.
    modules : mapping of str to nn.Module
        All modules of the network.
    kind : {"norm", "conv"}, optional
        Which modules may select at all: batch norms, or convolutions that start a residual branch.

    Examples
    --------
    >>> class Dense(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return torch.cat([x, self.norm(x)], 1)
    >>> model = Dense()
    >>> [node.name for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"
    ...  and may_select(node, dict(model.named_modules()), "norm")]
    ['norm']
    """
    module = modules[str(node.target)]
    if kind == "norm":
        return isinstance(module, _BatchNorm) and _is_shared(node, modules)
    if kind == "conv" and isinstance(module, nn.Conv2d) and module.groups == 1:
        return _is_shared(node, modules) and not _is_projection(node, modules)
    return False


def _is_shared(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node's input is anything but the output of one layer for this reader alone."""
    (source, *_) = node.all_input_nodes
    while source.op != "placeholder":
        if len(_channel_readers(source)) > 1 or len(source.all_input_nodes) != 1:
            return True
        if source.op == "call_module" and isinstance(modules[str(source.target)], (nn.Conv2d, nn.Linear)):
            return False
        (source,) = source.all_input_nodes
    return False


def _is_projection(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a convolution's output meets an addition before any other layer: a shortcut has to see all."""
    while len(_channel_readers(node)) == 1:
        (node,) = _channel_readers(node)
        if len(node.all_input_nodes) > 1:
            return node.op != "call_module" and operation_name(node) == "add"
        if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Conv2d, nn.Linear)):
            return False
    return False


def _channel_readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value, not counting those that only ask for its shape."""
    shape = ("size", "getattr", "dim")
    return [user for user in node.users if user.op == "call_module" or operation_name(user) not in shape]
