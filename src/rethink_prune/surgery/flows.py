"""What travels along the edges of a graph: streams of channels, channel counts, and nothing that can be pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from torch import fx, nn

Ids = npt.NDArray[np.int64]


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
    """

    ids: Ids
    axis: int
    zero: bool = True


@dataclass(frozen=True)
class ChannelCount:
    """An integer that the network read off a stream: the number of its channels."""

    ids: Ids


# What travels along an edge of the graph. None is what no channel can be removed from: the input image, a
# parameter, a number, or the result of an operation without a rule.
Flow = Union[ChannelStream, ChannelCount, Sequence["Flow"], None]  # noqa: UP007  (a string cannot be an operand of |)


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
        leaves: list[Any] = []
        fx.node.map_aggregate((self.flow_args, dict(self.flow_kwargs)), leaves.append)
        return [leaf for leaf in leaves if isinstance(leaf, ChannelStream | ChannelCount)]


def count_from_end(dim: int, ndim: int) -> int:
    """Return a dimension as a negative number.

    Examples
    --------
    >>> count_from_end(1, 4), count_from_end(-3, 4)
    (-3, -3)
    """
    return dim - ndim if dim >= 0 else dim
