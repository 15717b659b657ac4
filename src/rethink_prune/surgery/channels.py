"""Which channels of a network can be pruned, and which only together: the analysis all pruners rely on.

`analyse` traces the network, pushes channel ids through it (see `follow` and `function_rules`) and sorts them:
channels that have to go together are a *unit*, the units of a layer (or of layers that share units) a
*group*. Pruners score units; `Channels.plan` turns the units to drop into the positions each module keeps,
for `cut` to take.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import SELECTED, selecting_module, selects
from rethink_prune.surgery.channel_ids import ChannelIds, ChannelSplit, FollowedNode, Ids
from rethink_prune.surgery.exported import Graphs, trace_modes
from rethink_prune.surgery.follow import follow_channels, tie_shared_parameters
from rethink_prune.surgery.graph import draws_numbers, trace, why_uneditable

Kind = Literal["conv", "linear", "tokens", "heads", "selection"]
Attention = Literal["heads", "widths"]
Positions = tuple[int, ...]
# How often a forward pass is traced that draws random numbers.
_DRAWN_TRACES = 16
# Kinds of constants that say what there was before the cut.
_REMEMBERED = ("infer", "scale")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels to choose among: any of its units may go as long as one remains.

    Its units are alike: each has as many channels as any other in every layer and operation that it reaches. So shapes
    and cost of the pruned network depend on how many units of each group go, not on which.

    Attributes
    ----------
    name : str
        Name of the first layer in order of execution, followed by ``#2``, ``#3``, ... for further groups that
        start with the same layer, such as the second half of an output that is split in two.
    kind : {"conv", "linear", "tokens", "heads", "selection"}
        What the first layer is. A linear layer is of kind "tokens" if it reads more than one vector per image, and of
        kind "heads" if attention reads its channels head by head.
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
    kind: Kind
    layers: tuple[str, ...]
    units: tuple[Mapping[str, Positions], ...]
    norms: Mapping[str, tuple[Positions, ...]]

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.units)


@dataclass(frozen=True)
class CutPlan:
    """What to keep of each module; modules that stay as they are do not appear.

    Attributes
    ----------
    input_shape : tuple of int
        The shape the network was analysed with.
    operations : mapping of str to (str, tuple of int)
        What each node of the evaluation graph calls, and the shape it must have after surgery.
    outputs : mapping of str to tuple of int
        Kept output positions of convolutions and linear layers, kept channels of batch norms.
    inputs : mapping of str to tuple of int
        Kept input positions of convolutions without groups and of linear layers (features, after a flatten).
    selections : mapping of str to tuple of int
        The channels that a batch norm or convolution reads of a stream that stays whole.
    attributes : mapping of str to mapping of str to value
        The attributes to set: ``out_channels``, ``in_channels``, ``groups``, ``num_features``, ...
    edits : mapping of str to mapping
        New numbers for constants in the graph that count channels, by node name; see `cut`.
    parameters : mapping of str to mapping of int to tuple of int
        Kept positions along the dimensions of parameters that no layer owns.
    graphs : Graphs
        What the network runs.
    """

    input_shape: tuple[int, ...]
    operations: dict[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    graphs: Graphs = field(repr=False)
    outputs: dict[str, Positions] = field(default_factory=dict)
    inputs: dict[str, Positions] = field(default_factory=dict)
    selections: dict[str, Positions] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    edits: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, dict[int, Positions]] = field(default_factory=lambda: defaultdict(dict))


class Channels:
    """The channels of a network: see `analyse`, which makes it.

    Attributes
    ----------
    graphs : Graphs
        What the network runs.
    frozen : mapping of str to str
        Layers of which no channel can go, with the reason.
    warnings : tuple of str
        Operations that are not known, and other reasons why the analysis left more whole than it might.
    """

    def __init__(self, ids: ChannelIds, graphs: Graphs) -> None:
        self._ids, self.graphs = ids, graphs
        # From ids to units: ids that go together get the same number. The rules only collect pairs; SciPy finds the
        # connected components of all of them at once.
        self._unit_of = _components(ids.count, [*ids.united, *ids.tied])
        outputs = {name: self._unit_of[values] for name, values in ids.outputs.items()}
        self._coupled = {unit for values in ids.coupled for unit in self._unit_of[values].tolist()}
        # Of several reasons the first one is reported.
        reasons: dict[int, str] = {}
        for values, reason in reversed(ids.frozen):
            reasons |= dict.fromkeys(self._unit_of[values].tolist(), reason)
        self._free = np.ones(ids.count, dtype=bool)
        self._free[list(reasons)] = False
        self.frozen: Mapping[str, str] = {
            name: reasons[units[0].item()] for name, units in outputs.items() if not self._free[units].any()
        }
        self.warnings = tuple(dict.fromkeys(ids.warnings))
        if ids.statistics:
            count, first = len(set(ids.statistics)), ids.statistics[0]
            self.warnings += (f"approximate: {count} layer norms ({first}, ...) have other statistics after pruning",)

    @property
    def exported(self) -> bool:
        """Whether ``torch.export`` made the graph: a pruned network runs images of this size only."""
        return self.graphs.exported

    def groups(self, scope: str = "inner") -> tuple[ChannelGroup, ...]:
        """Return the prunable groups in order of execution.

        Parameters
        ----------
        scope : {"inner", "all"}
            Without or with the channels that an addition or padding ties to others.

        Examples
        --------
        >>> channels = analyse(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> [group.layers for group in channels.groups("all")]
        [('0',)]
        """
        if scope not in ("inner", "all"):
            raise UserError(f"scope={scope}: must be inner or all")
        return tuple(group for group, _, coupled in self._groups.values() if scope == "all" or not coupled)

    def consumers(self, layer: str) -> tuple[str, ...]:
        """Return the convolutions and linear layers that read this layer's channels, in order of execution.

        What one channel becomes on the way counts as that channel: normalised, pooled, added to others. Where
        an addition joins several layers, a reader of the sum counts if it runs after `layer`.

        Examples
        --------
        >>> channels = analyse(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> channels.consumers("0")
        ('2',)
        """
        if layer not in self._ids.outputs:
            raise UserError(f"{layer}: is no convolution, linear layer or selection of this network")
        order = list(self._ids.outputs)
        later = [name for name in order[order.index(layer) + 1 :] if name in self._ids.inputs]
        # Without `tied`: a depthwise convolution's output goes with its input, but it is another value.
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

        Examples
        --------
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 1))
        >>> channels = analyse(model, torch.zeros(1, 3, 4, 4))
        >>> channels.inputs(channels.groups()[0])
        {'2': ((0, 1, 2, 3), (4, 5, 6, 7))}
        """
        read = [self._inputs_of.get(unit, {}) for unit in self._groups[group.name][1]]
        names = [name for name in self._ids.inputs if any(name in places for places in read)]
        return {n: tuple(places.get(n, ()) for places in read) for n in names if n not in group.layers}

    def can_go(self, split: ChannelSplit) -> bool:
        """Tell whether channels that a view lays along several dimensions reach attention, and can go."""
        confirmed = np.concatenate([np.empty(0, dtype=np.int64), *self._ids.confirmed])
        return bool(np.isin(split.ids, confirmed).any() and self._free[self._unit_of[split.ids]].any())

    def plan(self, drop: Mapping[str, Iterable[int]]) -> CutPlan:
        """Return what each module keeps if units are dropped.

        Parameters
        ----------
        drop : mapping of str to iterable of int
            Group name to indexes into its units.

        Raises
        ------
        UserError
            If there is no such group or unit, or if a group or module would be left without channels.

        Examples
        --------
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> plan = analyse(model, torch.zeros(1, 3, 8, 8)).plan({"0": [1, 3]})
        >>> plan.outputs, plan.inputs
        ({'0': (0, 2)}, {'2': (0, 2)})
        """
        keep = np.ones(self._ids.count, dtype=bool)
        for name, indexes in drop.items():
            if name not in self._groups:
                reason = self.frozen.get(name)
                raise UserError(f"{name}: " + (f"stays whole ({reason})" if reason else "no group of this network"))
            group, units, _ = self._groups[name]
            chosen = sorted(set(indexes))
            if chosen and not (chosen[0] >= 0 and chosen[-1] < group.size):
                raise UserError(f"{name}: units to drop must be between 0 and {group.size - 1}")
            if len(chosen) == group.size:
                raise UserError(f"{name}: would lose all of its {group.size} channels; keep at least 1")
            keep[[units[index] for index in chosen]] = False
        return _plan_cut(keep[self._unit_of], self._ids, self.graphs)

    @cached_property
    def _inputs_of(self) -> dict[int, dict[str, Positions]]:
        return self._places(self._ids.inputs)

    @cached_property
    def _groups(self) -> dict[str, tuple[ChannelGroup, list[int], bool]]:
        """Each group by name, with the numbers of its units and whether they are coupled."""
        norm_ids = {n: v for n, v in self._ids.features.items() if isinstance(self._ids.modules[n], _BatchNorm)}
        layers_of, norms_of = self._places(self._ids.outputs), self._places(norm_ids)
        # Where a layer has units of several kinds, each kind is a group, so that no choice within groups empties a
        # layer or decides a shape. (The streams of a ResNet with padded shortcuts: 16, 16 more and 32 more channels;
        # the halves of an output that is split between two branches.)
        reached = self._reached()
        heads = {unit for split in self._ids.splits for unit in self._unit_of[split.ids].tolist()}
        members: defaultdict[tuple[bool, tuple[str, ...], frozenset[tuple[int, int]]], list[int]] = defaultdict(list)
        for unit, places in layers_of.items():
            members[unit in self._coupled, tuple(places), frozenset(reached[unit].items())].append(unit)
        found: dict[str, tuple[ChannelGroup, list[int], bool]] = {}
        for (coupled, layers, _), units in members.items():
            same = sum(group.layers[0] == layers[0] for group, _, _ in found.values())
            name = f"{layers[0]}#{same + 1}" if same else layers[0]
            linear = isinstance(self._ids.modules.get(layers[0]), nn.Linear)
            kind: Kind = "selection" if selecting_module(layers[0]) else "linear" if linear else "conv"
            if heads.intersection(units):
                kind = "heads"
            elif kind == "linear" and len(self._output_shapes.get(layers[0], ())) > 2:
                kind = "tokens"
            passed = dict.fromkeys(norm for unit in units for norm in norms_of.get(unit, ()))
            norms = {norm: tuple(norms_of.get(unit, {}).get(norm, ()) for unit in units) for norm in passed}
            group = ChannelGroup(name, kind, layers, tuple(layers_of[unit] for unit in units), norms)
            found[name] = group, units, coupled
        return found

    def _reached(self) -> defaultdict[int, Counter[int]]:
        """Return for each unit which lists of channels it is in, and how often."""
        ids = self._ids
        lists = [
            *(values for table in (ids.outputs, ids.inputs, ids.features) for values in table.values()),
            *(side for _, sides in ids.paddings.values() for side in sides),
            *(piece for constant in ids.constants for piece in (constant.stream, *constant.pieces)),
            *(values for table in ids.tensors.values() for values in table.values()),
            *(node.stream.ids for node in ids.nodes.values() if node.stream is not None),
        ]
        reached: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for index, values in enumerate(lists):
            for unit, count in zip(*np.unique(self._unit_of[values], return_counts=True), strict=True):
                reached[int(unit)][index] = int(count)
        return reached

    def _places(self, table: Mapping[str, Ids]) -> dict[int, dict[str, Positions]]:
        """Return for each unit that can go the modules it appears in, and where."""
        places: defaultdict[int, dict[str, Positions]] = defaultdict(dict)
        for name, values in table.items():
            units = self._unit_of[values]
            for position in np.flatnonzero(self._free[units]).tolist():
                found = places[int(units[position])]
                found[name] = (*found.get(name, ()), position)
        return places

    def output_shape(self, layer: str) -> tuple[int, ...] | None:
        """Return the shape of a layer's output, batch dimension included; None where evaluation does not call it.

        Examples
        --------
        >>> channels = analyse(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 7, 2))
        >>> channels.output_shape("0")
        (1, 7, 3)
        """
        return self._output_shapes.get(layer)

    @cached_property
    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        called = {node.call.partition("(")[0]: node.shape for node in self._ids.nodes.values()}
        return {**called, **self._ids.function_outputs}


def analyse(
    model: nn.Module,
    example: torch.Tensor,
    *,
    selecting: Literal["norm", "conv"] | None = None,
    attention: Attention = "heads",
    approximate: bool = False,
) -> Channels:
    """Find out which channels of a network can be pruned.

    Parameters
    ----------
    model : nn.Module
        Any module that ``torch.fx`` or ``torch.export`` can follow. Stays as it is: mode, buffers and random state
        included.
    example : torch.Tensor
        A batch of inputs; only its shape is used.
    selecting : {"norm", "conv"}, optional
        Let the batch norms, or the convolutions that start a residual branch, which read a stream with other
        readers (of a sum or concatenation, say) select channels of it: these are groups of their own, and the
        stream stays whole.
    attention : {"heads", "widths"}
        What can go of attention: whole heads, or the same dimensions of queries and keys, or of values, in all heads.
    approximate : bool
        Let channels go that a layer norm normalises together. The other channels' statistics change, so the result is
        not what the network computes with these channels set to zero.

    Returns
    -------
    Channels

    Raises
    ------
    UserError
        If the network cannot be traced, or does not take `example`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> channels = analyse(model, torch.zeros(1, 3, 8, 8))
    >>> [(group.name, group.size, list(group.norms)) for group in channels.groups()]
    [('0', 4, ['1'])]
    >>> channels.frozen
    {'3': 'network output'}
    """
    graphs = trace_modes(model, tuple(example.shape))
    choices: dict[str, int] = {}
    while True:
        ids = _follow_modes(model, graphs, tuple(example.shape), selecting, attention, approximate, choices)
        channels = Channels(ids, graphs)
        # Where a view lays channels along several dimensions, what follows tells which of them are the heads.
        refuted = [split for split in ids.splits if not channels.can_go(split)]
        others = [s.place for s in refuted if choices.get(s.place, 0) + 1 < s.choices]
        if not others:
            break
        choices |= {place: choices.get(place, 0) + 1 for place in others}
    for split in refuted:
        ids.freeze(split.all, f"{split.place}: lays channels along several dimensions, for no attention that is known")
    return Channels(ids, graphs) if refuted else channels


def _follow_modes(
    model: nn.Module,
    graphs: Graphs,
    input_shape: tuple[int, ...],
    selecting: str | None,
    attention: Attention,
    approximate: bool,
    choices: Mapping[str, int],
) -> ChannelIds:
    """Return what the rules find out in both modes; see `analyse`, and `ChannelIds` for the choices."""
    network = graphs.network
    known: dict[int, str] = {}
    names = {name: known.setdefault(id(p), name) for name, p in network.named_parameters(remove_duplicate=False)}
    ids = ChannelIds(dict(network.named_modules()), input_shape, names)
    ids.attention, ids.approximate, ids.choices = attention, approximate, choices
    ids.warnings += graphs.warnings
    ids.uneditable = why_uneditable(graphs.evaluation, graphs.training, alike=False)
    # The rules try activations on zeros, and some of these draw random numbers.
    with torch.random.fork_rng(devices=[]):
        ids.nodes = follow_channels(graphs.evaluation, network.eval(), ids, selecting)
        if graphs.training is not None and graphs.differ:
            # What only training mode runs, such as an auxiliary head, reads the same layers and is cut with them.
            ids.training = True
            follow_channels(graphs.training, graphs.training_network.eval(), ids, selecting)
            ids.training = False
        for mode, first in ((False, graphs.evaluation), (True, graphs.training)):
            # Which operations run may depend on the draws: a block that is skipped at random, say.
            for seed in range(1, _DRAWN_TRACES) if first is not None and draws_numbers(first) else ():
                drawn_network = on_meta(model)
                drawn = trace(drawn_network, training=mode, seed=seed)
                follow_channels(drawn, drawn_network.eval(), ids, selecting)
    tie_shared_parameters(ids)
    for name, module in model.named_modules():
        if selects(module) and not module.get_buffer(SELECTED).is_meta:
            ids.selected[name] = module.get_buffer(SELECTED).tolist()
    return ids


def _plan_cut(keep: npt.NDArray[np.bool_], ids: ChannelIds, graphs: Graphs) -> CutPlan:
    """Return what each module keeps.

    Parameters
    ----------
    keep : ndarray of bool
        For each id, whether its channel is kept.
    ids : ChannelIds
        From the analysis of the network.

    Raises
    ------
    UserError
        If a module would be left without channels.
    """
    operations = {name: (node.call, _shape_after(node, keep)) for name, node in ids.nodes.items()}
    plan = CutPlan(ids.input_shape, operations, graphs)
    # The projections of nn.MultiheadAttention are parameters of it, which are cut by their own names below.
    joint = {name for name, module in ids.modules.items() if isinstance(module, nn.MultiheadAttention)}
    for name, kept in _find_cut(ids.outputs, keep):
        if name in joint:
            continue
        module = selecting_module(name)
        if module is None:
            plan.outputs[name] = kept
            layer = ids.modules[name]
            plan.attributes[name]["out_features" if isinstance(layer, nn.Linear) else "out_channels"] = len(kept)
        else:
            # Positions count what the module selects so far; the architecture counts the channels of the stream.
            before = ids.selected.get(module)
            plan.selections[module] = kept if before is None else tuple(before[position] for position in kept)
    for name, kept in _find_cut(ids.inputs, keep):
        if name in joint:
            continue
        layer = ids.modules[name]
        plan.attributes[name]["in_features" if isinstance(layer, nn.Linear) else "in_channels"] = len(kept)
        groups = getattr(layer, "groups", 1)
        if groups == 1:
            plan.inputs[name] = kept
        else:  # whole groups go, which are rows of the weight; its columns are those of one group
            plan.attributes[name]["groups"] = groups * len(kept) // len(ids.inputs[name])
    # A batch norm's channels, or the slopes of a PReLU with one for each channel.
    for name, kept in _find_cut(ids.features, keep):
        plan.outputs[name] = kept
        if isinstance(ids.modules[name], nn.LayerNorm):
            plan.attributes[name]["normalized_shape"] = [len(kept)]
        else:
            norm = isinstance(ids.modules[name], _BatchNorm)
            plan.attributes[name]["num_features" if norm else "num_parameters"] = len(kept)
    for name, table in ids.tensors.items():
        for dim, values in table.items():
            for _, kept in _find_cut({name: values}, keep):
                plan.parameters[name][dim] = kept
    for name, (position, added) in ids.paddings.items():
        full: Any = ids.modules[name].padding
        counts = [int(keep[side].sum()) for side in added]
        if counts != list(full[position : position + 2]):
            plan.attributes[name]["padding"] = [*full[:position], *counts, *full[position + 2 :]]
    for constant in ids.constants:
        counts = [int(keep[piece].sum()) for piece in constant.pieces]
        if constant.kind in _REMEMBERED:
            counts = [] if counts == [len(piece) for piece in constant.pieces] else [len(p) for p in constant.pieces]
            if counts:
                plan.edits[constant.node] = {"kind": constant.kind, "position": constant.position, "counts": counts}
            continue
        # An operation such as x[:, 4:] or chunk arrives at other counts by itself.
        if counts != list(constant.unedited(int(keep[constant.stream].sum()))):
            plan.edits[constant.node] = {"kind": constant.kind, "position": constant.position, "counts": counts}
    return plan


def _shape_after(node: FollowedNode, keep: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    if node.stream is None:
        return node.shape
    dim = len(node.shape) + node.stream.axis
    return (*node.shape[:dim], int(keep[node.stream.ids].sum()), *node.shape[dim + 1 :])


def _find_cut(table: Mapping[str, Ids], keep: npt.NDArray[np.bool_]) -> Iterator[tuple[str, Positions]]:
    """Yield the modules of a table that lose channels, with the positions they keep."""
    for name, values in table.items():
        kept = np.flatnonzero(keep[values])
        if not len(kept):
            # Torch runs a convolution without inputs, and returns its bias.
            raise UserError(f"{name}: would be left without channels")
        if len(kept) < len(values):
            yield name, tuple(kept.tolist())


def _components(count: int, edges: list[tuple[Ids, Ids]]) -> npt.NDArray[np.int64]:
    """Return the number of the connected component of each of ``0 ... count - 1``."""
    if not edges:
        return np.arange(count)
    first, second = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
