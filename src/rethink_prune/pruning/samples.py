"""Random samples of what layers read, for pruners that reconstruct a layer's output from fewer channels."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.pruning.pruner import Batches
from rethink_prune.surgery.architecture import SELECTED, selects
from rethink_prune.surgery.exported import Graphs
from rethink_prune.surgery.graph import infer_values, layer_calls, trace

# Float64 values of one piece of a sample that are in memory at a time: 32 MB.
_PIECE = 2**22


class FirstImages:
    """The first images of batches, to be gone through many times.

    Parameters
    ----------
    data : iterable of (images, labels)
    count : int
        How many to read.
    shape : tuple of int, optional
        Of one image; not checked by default.

    Attributes
    ----------
    read : int
        How many were there, as far as they were gone through.

    Raises
    ------
    UserError
        If there are none, if they have another shape, or if they can be read only once.
    """

    def __init__(self, data: Batches, count: int, shape: tuple[int, ...] | None = None) -> None:
        # The first layer would use an iterator up.
        if data is None or iter(data) is data:
            raise UserError(
                "data: must be batches of (images, labels) that can be read many times, e.g. a list of them"
            )
        self._data, self._count, self.read = data, count, 0
        first = next(iter(self), None)
        if first is None:
            raise UserError("data: holds no images")
        if shape is not None and tuple(first.shape[1:]) != shape:
            sizes = [" x ".join(map(str, size)) for size in (first.shape[1:], shape)]
            raise UserError(f"data: its images are {sizes[0]}, but the network was analysed for {sizes[1]}")
        self.device = first.device

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (images for images, _ in self._batches())

    def labelled(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the images batch by batch, each batch with its labels.

        Raises
        ------
        UserError
            If the labels are not one class number for each image.
        """
        for images, labels in self._batches():
            whole = isinstance(labels, torch.Tensor) and labels.shape == (len(images),)
            if not whole or labels.is_floating_point() or labels.is_complex():
                raise UserError("data: labels must be one class number for each image, as whole numbers")
            yield images, labels.long()

    def _batches(self) -> Iterator[tuple[torch.Tensor, Any]]:
        seen = 0
        for batch in self._data:
            if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], torch.Tensor)):
                raise UserError(f"data: a batch must be a pair of images and labels, not a {type(batch).__name__}")
            images, labels = batch
            most = self._count - seen
            images, labels = images[:most], labels[:most]
            seen += len(images)
            self.read = max(self.read, seen)
            if len(images):
                yield images, labels
            if seen == self._count:
                return


Layer = nn.Linear | _ConvNd
# Places in a layer's output: for each the image of the batch, and the position in every spatial dimension.
Places = tuple[torch.Tensor, ...]


def pieces(places: Places, values_per_place: int) -> Iterator[Places]:
    """Split places so that the values read at those of one piece fit into memory.

    Examples
    --------
    >>> [len(image) for image, *position in pieces((torch.arange(5), torch.arange(5)), 2**21)]
    [2, 2, 1]
    """
    size = max(1, _PIECE // values_per_place)
    return zip(*(indexes.split(size) for indexes in places), strict=True)


def draw_places(
    layer: Layer, inputs: torch.Tensor, per_image: int, generator: torch.Generator, *, distinct: bool = False
) -> Places:
    """Draw places in the output of a layer, the same number in every image, uniformly and with replacement.

    Parameters
    ----------
    layer : torch.nn.Module
        A convolution or linear layer.
    inputs : torch.Tensor
        What it reads: N x C x spatial dimensions; N x spatial dimensions x C for a linear layer.
    per_image : int
        Places per image.
    generator : torch.Generator
        On the CPU, so that the draw does not depend on the device.
    distinct : bool
        Take every place once if an image has no more than `per_image`.

    Examples
    --------
    >>> inputs = torch.zeros(2, 3, 4, 3)
    >>> draw_places(nn.Conv2d(3, 8, 3), inputs, 5, torch.Generator(), distinct=True)
    (tensor([0, 0, 1, 1]), tensor([0, 1, 0, 1]), tensor([0, 0, 0, 0]))
    """
    # Shapes alone: the layer's own rule for strides, dilation and padding, without computing anything.
    shape = on_meta(layer)(inputs.to("meta")).shape
    size = shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]
    count, images = math.prod(size), len(inputs)
    if distinct and count <= per_image:
        flat = torch.arange(count).repeat(images)
    else:
        flat = torch.randint(count, (images * per_image,), generator=generator)
    image = torch.arange(images).repeat_interleave(len(flat) // images)
    return tuple(indexes.to(inputs.device) for indexes in (image, *torch.unravel_index(flat, size)))


def read_patches(layer: Layer, inputs: torch.Tensor, places: Places) -> torch.Tensor:
    """Return what a layer reads to compute its output at some places: n x C_in x K in float64.

    Parameters
    ----------
    layer, inputs
        As for `draw_places`.
    places : Places
        n of them.

    Examples
    --------
    >>> inputs = torch.arange(6.0).view(1, 1, 2, 3)
    >>> read_patches(nn.Conv2d(1, 1, 2), inputs, (torch.tensor([0]), torch.tensor([0]), torch.tensor([1])))
    tensor([[[1., 2., 4., 5.]]], dtype=torch.float64)
    """
    image, *position = places
    if isinstance(layer, nn.Linear):
        patches = inputs[places].unsqueeze(2)
    else:
        # The layer's own list: it has the two sides of padding="same" worked out.
        padding = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(inputs, padding, mode) if any(padding) else inputs
        # Indexes of every kernel position, instead of unfolding the whole input: few places of many are read.
        offsets = torch.cartesian_prod(*(torch.arange(size, device=inputs.device) for size in layer.kernel_size))
        steps = zip(position, layer.stride, offsets.reshape(-1, len(position)).T, layer.dilation, strict=True)
        index = [start[:, None] * stride + offset * dilation for start, stride, offset, dilation in steps]
        patches = padded.movedim(1, -1)[(image[:, None], *index)].transpose(1, 2)
    if selects(layer):
        patches = patches.index_select(1, layer.get_buffer(SELECTED))
    return patches.double()


def read_outputs(layer: Layer, values: torch.Tensor, places: Places) -> torch.Tensor:
    """Return values in the shape of a layer's output at some places: n x C_out in float64.

    Examples
    --------
    >>> read_outputs(nn.Linear(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (torch.tensor([1]),))
    tensor([[3., 4.]], dtype=torch.float64)
    """
    if not isinstance(layer, nn.Linear):
        values = values.movedim(1, -1)
    return values[places].double()


def output_positions(model: nn.Module, input_shape: tuple[int, ...], graphs: Graphs | None = None) -> dict[str, int]:
    """Return how many positions the output of each convolution and linear layer has per image.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    input_shape : tuple of int
        Of one image.
    graphs : Graphs, optional
        What the network runs, where ``torch.fx`` alone cannot trace it.

    Examples
    --------
    >>> output_positions(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), (3, 8, 8))
    {'0': 36, '2': 1}
    """
    if graphs is not None and graphs.exported:
        shapes, graph = graphs.network, graphs.evaluation
    else:
        shapes = on_meta(model)
        graph = trace(shapes)
    values = infer_values(graph, shapes, (1, *input_shape))
    layers = {name: layer for name, layer in shapes.named_modules() if isinstance(layer, Layer)}
    calls = {name: layer_calls(graph, name) for name in layers}
    return {
        name: sum(values[node].numel() for node in calls[name]) // len(layer.weight)
        for name, layer in layers.items()
        if calls[name]
    }
