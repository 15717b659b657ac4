"""Which channels of a network can be pruned, and which only together: the analysis all pruners rely on.

`analyse` traces the network, pushes channel ids through it (see `streams` and `rules`) and sorts them:
channels that have to go together are a *unit*, the units of a layer (or of layers that share units) a
*group*. Pruners score units; `Channels.plan` turns the units to drop into the positions each module keeps,
for `surgery` to cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.channel_ids import Call, ChannelIds, Flow, Ids, NoRule, Stream, selecting_module
from rethink_prune.surgery.graph import describe_call, evaluate, selects, trace
from rethink_prune.surgery.rules import function_rule, module_rule, operation_name

Positions = tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels to choose among: any of its units may go as long as one remains.

    Attributes
    ----------
    name : str
        Name of the first layer in order of execution, followed by ``#2``, ``#3``, ... for further groups that
        start with the same layer.
    kind : {"conv", "linear", "selection"}
        What the first layer is.
    layers : tuple of str
        The convolutions and linear layers whose output channels it covers, each unit some of all; or the one
        selection, named ``<module>.selected``.
    units : tuple of mappings from str to tuple of int
        What goes or stays together: for each unit its output positions in each layer. One position in one
        layer as a rule; a whole group of a grouped convolution; a position in several layers where an
        addition ties them.
    norms : mapping of str to tuple of tuple of int
        For each batch norm that these channels pass, its positions for each unit.
    """

    name: str
    kind: Literal["conv", "linear", "selection"]
    layers: tuple[str, ...]
    units: tuple[Mapping[str, Positions], ...]
    norms: Mapping[str, tuple[Positions, ...]]

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.units)


@dataclass(frozen=True)
class Plan:
    """What to keep of each module; modules that stay as they are do not appear.

    Attributes
    ----------
    outputs : mapping of str to tuple of int
        Kept output positions of convolutions and linear layers, kept channels of batch norms.
    inputs : mapping of str to tuple of int
        Kept input positions of convolutions without groups and of linear layers (features, after a flatten).
    selections : mapping of str to tuple of int
        The channels that a batch norm or convolution reads of a stream that stays whole.
    attributes : mapping of str to mapping of str to value
        The attributes to set: ``out_channels``, ``in_channels``, ``groups``, ``num_features``, ...
    edits : mapping of str to mapping
        New numbers for constants in the graph that count channels, by node name; see `surgery.rewrite`.
    widths : mapping of str to (int, int)
        Kept and full output channels of every convolution, linear layer and selection.
    input_shape : tuple of int
        The shape the network was analysed with.
    calls, shapes : mapping of str
        What each node of the evaluation graph calls, and the shape it must have after surgery.
    """

    outputs: Mapping[str, Positions]
    inputs: Mapping[str, Positions]
    selections: Mapping[str, Positions]
    attributes: Mapping[str, Mapping[str, Any]]
    edits: Mapping[str, Mapping[str, Any]]
    widths: Mapping[str, tuple[int, int]]
    input_shape: tuple[int, ...]
    calls: Mapping[str, str] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)


class Channels:
    """The channels of a network: see `analyse`, which makes it.

    Attributes
    ----------
    frozen : mapping of str to str
        Layers of which no channel can go, with the reason.
    warnings : tuple of str
        Operations that are not known, and other reasons why the analysis left more whole than it might.
    """

    frozen: Mapping[str, str]
    warnings: tuple[str, ...]

    def __init__(
        self,
        network: nn.Module,
        ids: ChannelIds,
        nodes: Mapping[str, _Node],
        selected: Mapping[str, list[int]],
        input_shape: tuple[int, ...],
    ) -> None:
        self._modules = dict(network.named_modules())
        self._ids = ids
        self._nodes = nodes
        self._selected = selected
        self._input_shape = input_shape
        # From ids to units: ids that go together get the same number.
        self._unit_of = _components(ids.count, [*ids.united, *ids.tied])
        self._outputs = {name: self._unit_of[values] for name, values in ids.outputs.items()}
        self._coupled = {unit for values in ids.coupled for unit in self._unit_of[values].tolist()}
        reasons: dict[int, str] = {}
        for values, reason in ids.frozen:
            for unit in np.unique(self._unit_of[values]).tolist():
                reasons.setdefault(unit, reason)
        self._free = np.ones(ids.count, dtype=bool)
        self._free[list(reasons)] = False
        self.frozen = {
            name: reasons[units[0].item()] for name, units in self._outputs.items() if not self._free[units].any()
        }
        self.warnings = tuple(dict.fromkeys(ids.warnings))

    def groups(self, scope: str = "inner") -> tuple[ChannelGroup, ...]:
        """Return the prunable groups in order of execution.

        Parameters
        ----------
        scope : {"inner", "all"}
            Without or with the channels that an addition or padding ties to others.
        """
        if scope not in ("inner", "all"):
            raise UserError(f"scope={scope}: must be inner or all")
        return tuple(group for group, _, coupled in self._groups.values() if scope == "all" or not coupled)

    def consumers(self, layer: str) -> tuple[str, ...]:
        """Return the convolutions and linear layers that read this layer's channels, in order of execution.

        What one channel becomes on the way counts as that channel: normalised, pooled, added to others. Where
        an addition joins several layers, a reader of the sum counts if it runs after `layer`.
        """
        if layer not in self._outputs:
            raise UserError(f"{layer}: is no convolution, linear layer or selection of this network")
        order = list(self._outputs)
        later = [name for name in order[order.index(layer) + 1 :] if name in self._ids.inputs]
        values = _components(self._ids.count, self._ids.united)
        written = values[self._ids.outputs[layer]]
        return tuple(name for name in later if np.isin(written, values[self._ids.inputs[name]]).any())

    def inputs(self, group: ChannelGroup) -> dict[str, tuple[Positions, ...]]:
        """Return where each unit of a group enters the layers that read it, in order of execution.

        Returns
        -------
        dict of str to tuple of tuple of int
            For each convolution or linear layer that reads the group's channels and is none of its own layers: per
            unit its input positions (several after a flatten, one as a rule).
        """
        _, units, _ = self._groups[group.name]
        number = {unit: index for index, unit in enumerate(units)}
        found: dict[str, tuple[Positions, ...]] = {}
        for name, values in self._ids.inputs.items():
            if name in group.layers:
                continue
            places: list[list[int]] = [[] for _ in units]
            for position, unit in enumerate(self._unit_of[values].tolist()):
                if unit in number:
                    places[number[unit]].append(position)
            if any(places):
                found[name] = tuple(map(tuple, places))
        return found

    def plan(self, drop: Mapping[str, Iterable[int]]) -> Plan:
        """Return what each module keeps if units are dropped.

        Parameters
        ----------
        drop : mapping of str to iterable of int
            Group name to indexes into its units.

        Raises
        ------
        UserError
            If there is no such group or unit, or if a group or module would be left without channels.
        """
        keep = np.ones(self._ids.count, dtype=bool)
        for name, indexes in drop.items():
            keep[self._units_to_drop(name, indexes)] = False
        keep = keep[self._unit_of]  # from now on, by id

        outputs: dict[str, Positions] = {}
        inputs: dict[str, Positions] = {}
        selections: dict[str, Positions] = {}
        attributes: dict[str, dict[str, Any]] = {}
        widths: dict[str, tuple[int, int]] = {}
        for name, values in self._ids.outputs.items():
            kept = _kept(name, keep, values)
            widths[name] = len(kept), len(values)
            if len(kept) == len(values):
                continue
            module = selecting_module(name)
            if module is not None:
                before = self._selected.get(module)
                selections[module] = kept if before is None else tuple(before[position] for position in kept)
            else:
                outputs[name] = kept
                linear = isinstance(self._modules[name], nn.Linear)
                _set(attributes, name, "out_features" if linear else "out_channels", len(kept))
        for name, values in self._ids.inputs.items():
            kept, layer = _kept(name, keep, values), self._modules[name]
            if len(kept) < len(values):
                _set(
                    attributes,
                    name,
                    "in_features" if isinstance(layer, nn.Linear) else "in_channels",
                    len(kept),
                )
                groups = 1 if isinstance(layer, nn.Linear) else int(layer.groups)
                if groups == 1:
                    inputs[name] = kept
                else:
                    _set(attributes, name, "groups", groups * len(kept) // len(values))
        for name, values in self._ids.features.items():
            kept = _kept(name, keep, values)
            if len(kept) < len(values):
                outputs[name] = kept
                norm = isinstance(self._modules[name], _BatchNorm)
                _set(attributes, name, "num_features" if norm else "num_parameters", len(kept))
        for name, added in self._ids.paddings.items():
            counts = [int(keep[added.before].sum()), int(keep[added.after].sum())]
            padding = [*added.padding[: added.position], *counts, *added.padding[added.position + 2 :]]
            if padding != list(added.padding):
                _set(attributes, name, "padding", padding)

        edits: dict[str, dict[str, Any]] = {}
        for constant in self._ids.constants:
            counts = [int(keep[piece].sum()) for piece in constant.pieces]
            if counts != list(constant.unedited(int(keep[constant.stream].sum()))):
                edits[constant.node] = {
                    "kind": constant.kind,
                    "position": constant.position,
                    "counts": counts,
                }
        return Plan(
            outputs=outputs,
            inputs=inputs,
            selections=selections,
            attributes=attributes,
            edits=edits,
            widths=widths,
            input_shape=self._input_shape,
            calls={name: node.call for name, node in self._nodes.items()},
            shapes={name: node.shape_after(keep) for name, node in self._nodes.items()},
        )

    def _units_to_drop(self, name: str, indexes: Iterable[int]) -> list[int]:
        if name not in self._groups:
            reason = self.frozen.get(name)
            raise UserError(f"{name}: " + (f"stays whole ({reason})" if reason else "no group of this network"))
        group, units, _ = self._groups[name]
        chosen = sorted(set(indexes))
        if chosen and not (chosen[0] >= 0 and chosen[-1] < group.size):
            raise UserError(f"{name}: units to drop must be between 0 and {group.size - 1}")
        if len(chosen) == group.size:
            raise UserError(f"{name}: would lose all of its {group.size} channels; keep at least 1")
        return [units[index] for index in chosen]

    @cached_property
    def _groups(self) -> dict[str, tuple[ChannelGroup, list[int], bool]]:
        """Each group by name, with the numbers of its units and whether they are coupled."""
        layers_of = self._places(self._outputs)
        norms_of = self._places(
            {
                name: self._unit_of[values]
                for name, values in self._ids.features.items()
                if isinstance(self._modules[name], _BatchNorm)
            }
        )

        # Units of the same layers are alike; where a layer has several kinds, each is a group, so that no
        # choice within groups empties a layer. (The streams of a ResNet with padded shortcuts: 16, 16 more
        # and 32 more channels.)
        members: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
        for unit, places in layers_of.items():
            members.setdefault((unit in self._coupled, tuple(places)), []).append(unit)
        found: dict[str, tuple[ChannelGroup, list[int], bool]] = {}
        for (coupled, layers), units in members.items():
            name, number = layers[0], 1
            while name in found:
                name, number = f"{layers[0]}#{number + 1}", number + 1
            norms = dict.fromkeys(norm for unit in units for norm in norms_of.get(unit, ()))
            group = ChannelGroup(
                name=name,
                kind=self._kind(layers[0]),
                layers=layers,
                units=tuple(layers_of[unit] for unit in units),
                norms={norm: tuple(norms_of.get(unit, {}).get(norm, ()) for unit in units) for norm in norms},
            )
            found[name] = group, units, coupled
        return found

    def _kind(self, name: str) -> Literal["conv", "linear", "selection"]:
        if selecting_module(name) is not None:
            return "selection"
        return "linear" if isinstance(self._modules[name], nn.Linear) else "conv"

    def _places(self, tables: Mapping[str, npt.NDArray[np.int64]]) -> dict[int, dict[str, Positions]]:
        """Return for each unit that can go the modules it appears in, and where."""
        places: dict[int, dict[str, Positions]] = {}
        for name, units in tables.items():
            for position in np.flatnonzero(self._free[units]).tolist():
                found = places.setdefault(int(units[position]), {})
                found[name] = (*found.get(name, ()), position)
        return places


def analyse(model: nn.Module, example: torch.Tensor, *, selecting: Literal["norm", "conv"] | None = None) -> Channels:
    """Find out which channels of a network can be pruned.

    Parameters
    ----------
    model : nn.Module
        Any module that ``torch.fx`` can trace. Stays as it is: mode, buffers and random state included.
    example : torch.Tensor
        A batch of inputs; only its shape is used.
    selecting : {"norm", "conv"}, optional
        Let the batch norms, or the convolutions that start a residual branch, which read a stream with other
        readers (of a sum or concatenation, say) select channels of it: these are groups of their own, and the
        stream stays whole.

    Returns
    -------
    Channels

    Raises
    ------
    UserError
        If the network cannot be traced, or does not take `example`.
    """
    # The tracer puts constants into what it traces, so each trace has a copy.
    network, training_network = on_meta(model).eval(), on_meta(model).eval()
    input_shape = tuple(example.shape)
    ids = ChannelIds()
    graph = trace(network)
    try:
        training_graph = trace(training_network, training=True)
    except UserError as error:
        training_graph = None
        ids.warnings.append(f"only evaluation mode was followed; in training mode, {error}")
    alike = training_graph is not None and _calls(graph) == _calls(training_graph)
    # A constant is edited in a traced graph, which would then run in both modes.
    ids.can_edit = alike
    with torch.random.fork_rng(devices=[]):
        nodes = _follow(graph, network, ids, input_shape, selecting)
        if training_graph is not None and not alike:
            _follow(training_graph, training_network.eval(), ids, input_shape, selecting)
    _tie_parameters(network, ids)
    selected = {
        name: module.get_buffer("selected").tolist()
        for name, module in model.named_modules()
        if selects(module) and not module.get_buffer("selected").is_meta
    }
    return Channels(network, ids, nodes, selected, input_shape)


@dataclass(frozen=True)
class _Node:
    """A node of the evaluation graph: what it calls, and its shape as far as its ids are kept."""

    call: str
    shape: tuple[int, ...]
    stream: Stream | None

    def shape_after(self, keep: npt.NDArray[np.bool_]) -> tuple[int, ...]:
        if self.stream is None:
            return self.shape
        dim = len(self.shape) + self.stream.axis
        return (*self.shape[:dim], int(keep[self.stream.ids].sum()), *self.shape[dim + 1 :])


def _follow(
    graph: fx.Graph, network: nn.Module, ids: ChannelIds, input_shape: tuple[int, ...], selecting: str | None
) -> dict[str, _Node]:
    """Apply the rule of every node; return the nodes whose result is a tensor."""
    values = evaluate(graph, network, input_shape)
    flows: dict[fx.Node, Any] = {}
    nodes: dict[str, _Node] = {}
    modules = dict(network.named_modules())
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        call = Call(
            node=node,
            name=operation_name(node) if module is None else type(module).__name__,
            flow_args=fx.node.map_arg(node.args, flows.__getitem__),
            flow_kwargs=fx.node.map_arg(node.kwargs, flows.__getitem__),
            args=fx.node.map_arg(node.args, values.__getitem__),
            kwargs=fx.node.map_arg(node.kwargs, values.__getitem__),
            result=values[node],
        )
        flow: Flow = None
        try:
            if module is not None:
                selection = selects(module) or _may_select(node, module, modules, selecting)
                flow = module_rule(ids, call, module, selecting=selection and bool(call.counted()))
            elif node.op == "get_attr":
                ids.read_directly.add(str(node.target))
            elif node.op == "output":
                for stream in call.counted():
                    ids.freeze(stream.ids, "network output")
            elif call.counted():
                flow = function_rule(node)(ids, call)
            if isinstance(flow, Stream) and len(flow.ids) != call.result.shape[flow.axis]:
                flow = None
                raise NoRule(f"unknown form of {call.name}")
        except NoRule as reason:
            ids.leave_whole(call, str(reason) or f"unknown form of {call.name}")
        flows[node] = flow
        if isinstance(call.result, torch.Tensor):
            stream_or_none = flow if isinstance(flow, Stream) else None
            nodes[node.name] = _Node(describe_call(node), tuple(call.result.shape), stream_or_none)
    return nodes


def _may_select(node: fx.Node, module: nn.Module, modules: Mapping[str, nn.Module], selecting: str | None) -> bool:
    """Tell whether a module should select from what it reads: others read it too, or several layers write it."""
    if selecting == "norm":
        return isinstance(module, _BatchNorm) and _is_shared(node, modules)
    if selecting == "conv" and isinstance(module, nn.Conv2d) and module.groups == 1:
        return _is_shared(node, modules) and not _is_projection(node, modules)
    return False


def _is_shared(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node's input is anything but the output of one layer for this reader alone."""
    (source, *_) = node.all_input_nodes
    while source.op != "placeholder":
        if len(_readers(source)) > 1 or len(source.all_input_nodes) != 1:
            return True
        if source.op == "call_module" and isinstance(modules[str(source.target)], (nn.Conv2d, nn.Linear)):
            return False
        (source,) = source.all_input_nodes
    return False


def _is_projection(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a convolution's output meets an addition before any other layer: a shortcut has to see all."""
    while len(_readers(node)) == 1:
        (node,) = _readers(node)
        if len(node.all_input_nodes) > 1:
            return node.op != "call_module" and operation_name(node) == "add"
        if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Conv2d, nn.Linear)):
            return False
    return False


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value, not counting those that only ask for its shape."""
    shape = ("size", "getattr", "dim")
    return [user for user in node.users if user.op == "call_module" or operation_name(user) not in shape]


def _tie_parameters(network: nn.Module, ids: ChannelIds) -> None:
    """Unite modules with a parameter in common; freeze modules whose parameter is read outside of them."""
    owners: dict[int, list[tuple[str, str]]] = {}
    modules = dict(network.named_modules())
    for name, module in modules.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            owners.setdefault(id(tensor), []).append((name, key))
    tables = (ids.outputs, ids.inputs, ids.features)
    for places in owners.values():
        (first, first_key), *others = places
        alike = all(
            key == first_key
            and type(modules[name]) is type(modules[first])
            and getattr(modules[name], "groups", 1) == getattr(modules[first], "groups", 1)
            and all((name in table) == (first in table) for table in tables)
            for name, key in others
        )
        if not alike or any(f"{name}.{key}" in ids.read_directly for name, key in places):
            reason = "its parameters are read outside of it" if alike else "shares a parameter with another kind"
            for table in tables:
                for name, _ in places:
                    if name in table:
                        ids.freeze(table[name], f"{name}: {reason}")
            continue
        for name, key in others:
            for table in tables:
                if first in table and (table is not ids.inputs or key == "weight"):
                    ids.tie(table[first], table[name])


def _calls(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.name, describe_call(node)) for node in graph.nodes]


def _components(count: int, edges: Iterable[tuple[Ids, Ids]]) -> npt.NDArray[np.int64]:
    """Return the number of the connected component of each of ``0 ... count - 1``."""
    pairs = list(edges)
    if not pairs:
        return np.arange(count)
    first = np.concatenate([a for a, _ in pairs])
    second = np.concatenate([b for _, b in pairs])
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _kept(name: str, keep: npt.NDArray[np.bool_], ids: Ids) -> Positions:
    kept = tuple(np.flatnonzero(keep[ids]).tolist())
    if not kept:
        # Torch runs a convolution without inputs, and returns its bias.
        raise UserError(f"{name}: would be left without channels")
    return kept


def _set(attributes: dict[str, dict[str, Any]], name: str, attribute: str, value: Any) -> None:
    attributes.setdefault(name, {})[attribute] = value
