"""Channel ids: what stands for the same channel, what goes together, and what must stay.

Every convolution and linear layer gives its output channels fresh ids, and `follow` pushes them through the
graph. `ChannelIds` keeps what is learnt on the way. "A channel can go" means: the network without it computes
exactly what it computes with the channel's weights, and its batch norms' scale and shift, set to zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from torch import fx, nn

Ids = npt.NDArray[np.int64]


# The mark of a node that stands in the graph of training mode, where that is another than the one of evaluation mode.
TRAINING = "training/"


def count_from_end(dim: int, ndim: int) -> int:
    """Return a dimension as broadcasting counts it.

    Examples
    --------
    >>> count_from_end(1, 4), count_from_end(-1, 4)
    (-3, -1)
    """
    return dim - ndim if dim >= 0 else dim


class NoRule(Exception):
    """Raised by a rule that cannot say where channels go; the message, if any, says what is in the way."""


@dataclass(frozen=True)
class ChannelStream:
    """A tensor whose channels have ids.

    Attributes
    ----------
    ids : ndarray
        One id per channel; after a flatten, one per feature.
    axis : int
        The channel dimension, counted from the end (negative), as broadcasting counts.
    zero : bool
        Whether a channel is zero here when all that makes it is masked. False after a sigmoid, for example.
    own : bool
        Whether it is computed from parameters that no layer owns, and nothing else.
    """

    ids: Ids
    axis: int
    zero: bool = True
    own: bool = False


@dataclass(frozen=True)
class ChannelCount:
    """An integer that the network read off a stream: the number of its channels."""

    ids: Ids


@dataclass(frozen=True)
class OwnTensor:
    """A parameter that the network reads by itself, outside of any layer: a class token, a table of biases, a scale.

    Attributes
    ----------
    name : str
        Its name in the state dict.
    shape : tuple of int
    """

    name: str
    shape: tuple[int, ...]


# What travels along an edge of the graph. None is what no channel can be removed from: the input image, a
# parameter, a number, or the result of an operation without a rule.
Flow = Union[ChannelStream, ChannelCount, OwnTensor, Sequence["Flow"], None]  # noqa: UP007  (a string cannot be an operand of |)


@dataclass(frozen=True)
class Call:
    """One node of the graph, with flows and values of its arguments and the value of its result.

    Values are meta tensors, numbers, and containers of both. In `flow_args` and `flow_kwargs`, the flow of
    each node stands in its place. `name` is that of the operation, or of the class of `module`.
    """

    node: fx.Node
    module: nn.Module | None
    name: str
    flow_args: tuple[Any, ...]
    flow_kwargs: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def value(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument's value."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def dim(self, position: int, default: Any = None) -> Any:
        """Return the value of the argument that torch calls ``dim`` and also accepts as ``axis``."""
        return self.value(position, "dim", self.kwargs.get("axis", default))

    def flow(self, position: int, name: str) -> Any:
        """Return an argument's flow; a constant is its own."""
        return self.flow_args[position] if position < len(self.flow_args) else self.flow_kwargs.get(name)

    def written(self, position: int, name: str) -> Any:
        """Return an argument as the graph has it: a constant, a node, or a container of both."""
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name)

    @property
    def subject(self) -> ChannelStream:
        """The first argument, which channels must run through."""
        first = self.flow(0, "input")
        if not isinstance(first, ChannelStream):
            raise NoRule(f"{self.name} with a channel count")
        return first

    @property
    def stream(self) -> ChannelStream:
        """The first argument, which must be the only one that channels run through."""
        if len(self.channel_flows()) > 1:
            raise NoRule(f"{self.name} of several streams, or with a channel count")
        return self.subject

    @property
    def label(self) -> str:
        """Name for messages: the module's, or else the node's."""
        return self.node.name if self.module is None else str(self.node.target)

    def channel_flows(self) -> list[ChannelStream | ChannelCount]:
        """Return every stream and channel count among the arguments, in sequences, slices and mappings too."""
        # A call may have them anywhere: torch.cat([x, y]), x[:, :n], x.view(n, c, 1, 1).
        leaves: list[Any] = []
        fx.node.map_aggregate((self.flow_args, dict(self.flow_kwargs)), leaves.append)
        return [leaf for leaf in leaves if isinstance(leaf, ChannelStream | ChannelCount)]


# From the number of channels that an operation reads to the numbers of channels it counts.
Counts = Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Constant:
    """Numbers in an operation's arguments that count channels, such as the bounds of a slice.

    Attributes
    ----------
    node : str
        Name of the graph node.
    kind : {"slice", "narrow", "split", "pad", "size", "scale"}
        How the numbers are written; see `cut`.
    position : int
        Where in the argument they stand.
    stream : ndarray
        Ids of the operation's input.
    pieces : tuple of ndarray
        The ids that each number counts.
    unedited : callable
        The counts that the operation arrives at if it is left as it is.
    """

    node: str
    kind: str
    position: int
    stream: Ids
    pieces: tuple[Ids, ...]
    unedited: Counts


@dataclass(frozen=True)
class ChannelSplit:
    """Channels that a view lays along several dimensions, as attention does with its heads.

    The view stays a view only if the same goes from each row: what lies along the other dimensions goes together.

    Attributes
    ----------
    place : str
        Where it stands; see `ChannelIds.place`.
    ids : ndarray
        One id for each position along the dimension that may become shorter.
    all : ndarray
        All ids, of any shape.
    choices : int
        How many dimensions could be the one.
    """

    place: str
    ids: Ids
    all: Ids
    choices: int


@dataclass(frozen=True)
class FollowedNode:
    """A node of the graph whose result is a tensor: what it calls, the shape, and the channels if there are any."""

    call: str
    shape: tuple[int, ...]
    stream: ChannelStream | None


@dataclass
class ChannelIds:
    """The ids of a network's channels and what the rules found out about them.

    Attributes
    ----------
    modules : mapping of str to nn.Module
        All modules of the network, at full width.
    input_shape : tuple of int
        The shape the network is analysed with, batch dimension included.
    parameters : mapping of str to str
        From every name of each parameter to its first one.
    uneditable : str
        Why constants in the graph may not be rewritten; empty if they may.
    attention : {"heads", "widths"}
        Whether whole heads may go, or the same number of dimensions in all heads.
    approximate : bool
        Whether channels may go that a layer norm normalises together.
    choices : mapping of str to int
        Which dimension of a `ChannelSplit` may become shorter, by its place; the first of its candidates otherwise.
    count : int
        How many ids there are: 0, 1, ... ``count - 1``.
    outputs, inputs : dict of str to ndarray
        Ids of the output and input channels of each convolution and linear layer, by module name in order of
        execution. What a module selects from a stream is an output of its own, named by `architecture.selection_of`.
    features : dict of str to ndarray
        Ids of the channels that a module normalises or scales one by one.
    united : list of pairs of ndarray
        Ids that meet in one value (in a sum, for example), position by position: they go or stay together.
    tied : list of pairs of ndarray
        Ids that go or stay together because a module's weights tie them, position by position.
    frozen : list of (ndarray, str)
        Ids that must stay, and why.
    coupled : list of ndarray
        Ids that an addition or a padding ties.
    tensors : dict of str to dict of int to ndarray
        Ids along the dimensions of parameters that no layer owns.
    function_outputs : dict of str to tuple of int
        The shapes that linear functions give in evaluation mode, by the layer whose weight they read.
    splits : list of ChannelSplit
        Views that lay channels along several dimensions.
    confirmed : list of ndarray
        Ids that attention reads head by head, so that a split is what it looks like.
    statistics : list of str
        Where a normalisation computes other statistics once channels go; only if `approximate`.
    constants : list of Constant
        Numbers in the graph that count channels.
    training : bool
        Whether a graph of training mode is being followed, which differs from that of evaluation mode.
    paddings : dict of str to (int, pair of ndarray)
        Modules that add channels, by name: where in the padding their numbers start, the ids before and after a stream.
    selected : dict of str to list of int
        The channels that modules select already, as positions in the stream.
    nodes : dict of str to FollowedNode
        The nodes of the evaluation graph.
    read_directly : set of str
        Parameters and buffers that are read outside of their module, by name.
    warnings : list of str
        What was left whole for want of a rule.
    """

    modules: Mapping[str, nn.Module]
    input_shape: tuple[int, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    uneditable: str = ""
    attention: str = "heads"
    approximate: bool = False
    choices: Mapping[str, int] = field(default_factory=dict)
    training: bool = False
    count: int = 0
    outputs: dict[str, Ids] = field(default_factory=dict)
    inputs: dict[str, Ids] = field(default_factory=dict)
    features: dict[str, Ids] = field(default_factory=dict)
    united: list[tuple[Ids, Ids]] = field(default_factory=list)
    tied: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    coupled: list[Ids] = field(default_factory=list)
    tensors: dict[str, dict[int, Ids]] = field(default_factory=dict)
    function_outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    splits: list[ChannelSplit] = field(default_factory=list)
    confirmed: list[Ids] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    paddings: dict[str, tuple[int, tuple[Ids, Ids]]] = field(default_factory=dict)
    selected: dict[str, list[int]] = field(default_factory=dict)
    nodes: dict[str, FollowedNode] = field(default_factory=dict)
    read_directly: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def fresh(self, count: int) -> Ids:
        """Return new ids."""
        # Ids are counted up, so the ids of a network are the row 0 ... count - 1 that arrays are indexed by.
        self.count += count
        return np.arange(self.count - count, self.count)

    def fresh_frozen(self, count: int, reason: str) -> Ids:
        """Return new ids for channels that must stay."""
        ids = self.fresh(count)
        self.freeze(ids, reason)
        return ids

    def freeze(self, ids: Ids, reason: str) -> None:
        """Record that channels must stay."""
        self.frozen.append((ids, reason))

    def freeze_operands(self, call: Call, reason: str) -> None:
        """Freeze everything a call reads, with a warning."""
        for flow in call.channel_flows():
            self.freeze(flow.ids, f"{call.label}: {reason}")
        self.warnings.append(f"{call.label}: {reason}; the channels it reads stay whole")

    def place(self, call: Call) -> str:
        """Return where a call stands: the node's name, marked if only training mode runs this graph."""
        return TRAINING + call.node.name if self.training else call.node.name

    def is_split(self, stream: ChannelStream) -> bool:
        """Tell whether a view laid these channels along several dimensions, as heads are."""
        return any(np.isin(split.ids, stream.ids).any() for split in self.splits)

    def along(self, tensor: OwnTensor, axis: int) -> ChannelStream | None:
        """Return the channels of a parameter along one dimension, counted from the end; None if it has none there."""
        dim = len(tensor.shape) + axis
        if dim < 0 or tensor.shape[dim] == 1:
            return None
        known = self.tensors.setdefault(tensor.name, {})
        if dim not in known:
            known[dim] = self.fresh(tensor.shape[dim])
        return ChannelStream(known[dim], axis, own=True)

    def call_layer(self, name: str, inputs: Ids, outputs: int) -> Ids:
        """Return the ids of a layer's outputs, and record what it reads; layers may run several times."""
        if name in self.outputs:
            self.tied.append((self.inputs[name], inputs))
        else:
            self.inputs[name], self.outputs[name] = inputs, self.fresh(outputs)
        return self.outputs[name]

    def as_stream(self, flow: Any, axis: int) -> ChannelStream | None:
        """Return a flow as a stream along a dimension, counted from the end; None if no channels run there."""
        if isinstance(flow, OwnTensor):
            return self.along(flow, axis)
        return flow if isinstance(flow, ChannelStream) and flow.axis == axis else None

    def need_zero(self, stream: ChannelStream, call: Call) -> None:
        """Freeze the channels of `stream` if masking does not make them zero, so `call` would miss them."""
        if not stream.zero:
            self.freeze(stream.ids, f"{call.label}: reads values that are not zero in a masked channel")

    def add_constant(self, call: Call, kind: str, position: int, pieces: tuple[Ids, ...], unedited: Counts) -> None:
        """Record numbers in the call's arguments that count channels, or freeze what they count; see `Constant`."""
        stream = call.subject.ids
        # An edited constant stands in a traced graph, which then is all that the network runs, in both modes.
        if not self.uneditable:
            self.constants.append(Constant(self.place(call), kind, position, stream, pieces, unedited))
            return
        for ids in (stream, *pieces):
            self.freeze(ids, f"{call.label}: counts channels, and {self.uneditable}")
