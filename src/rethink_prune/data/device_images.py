"""Batches from images that live on the device as bytes, augmented there a whole batch, or many, at a time.

The draws of an epoch (order, crop offsets, flips) are made at once and belong to positions in the epoch, not to
batches. So they are the same for every batch size, and for an epoch that is resumed in its middle.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from rethink_prune.data.normalization import Batch, Normalization
from rethink_prune.data.rand_augment import apply_operations, draw_operations
from rethink_prune.data.source import ImageArray
from rethink_prune.seeds import derive_generator

# Of normalised images that are made at once on a GPU: some 80 batches of 64 images of CIFAR.
_BYTES_AT_ONCE = 64 << 20


class EpochDraws(NamedTuple):
    """The random choices of one epoch, by position in it; each tensor has N entries.

    Attributes
    ----------
    order : torch.Tensor
        int64: which image.
    top, left : torch.Tensor
        int64 in [0, 2 * pad]: the corner of the crop in the padded image.
    flip : torch.Tensor
        bool: mirrored left to right before the crop.
    """

    order: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    flip: torch.Tensor


def draw_epoch(images: int, *, pad: int, flip: bool, seed: int, epoch: int) -> EpochDraws:
    """Draw order, crops and flips of an epoch, on the CPU, from ``(seed, epoch)`` alone.

    Examples
    --------
    >>> draws = draw_epoch(4, pad=1, flip=False, seed=0, epoch=0)
    >>> draws.order.sort().values.tolist(), bool(draws.top.max() <= 2), draws.flip.any().item()
    ([0, 1, 2, 3], True, False)
    """
    order = torch.randperm(images, generator=derive_generator(seed, "order", epoch))
    augmentation = derive_generator(seed, "augmentation", epoch)
    top, left = torch.randint(0, 2 * pad + 1, (2, images), generator=augmentation)
    mirrored = torch.randint(0, 2, (images,), generator=augmentation).bool()
    return EpochDraws(order, top, left, mirrored & flip)


def blocks_of(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group the sizes of batches that follow each other, each group with at most `limit` images or a single batch.

    Examples
    --------
    >>> blocks_of([4, 4, 4, 2], 8), blocks_of([4, 2], 0)
    ([[4, 4], [4, 2]], [[4], [2]])
    """
    blocks: list[list[int]] = []
    for size in sizes:
        if blocks and sum(blocks[-1]) + size <= limit:
            blocks[-1].append(size)
        else:
            blocks.append([size])
    return blocks


class DeviceImages:
    """Images on the device, with the usual augmentation: zero padding, random crop, horizontal flip.

    Parameters
    ----------
    images : ImageArray
        A copy is kept on the device.
    normalize : Normalization
        Makes the network's input; also says on which device.
    pad : int
        Pixels of padding on each side, black before normalisation as in torchvision's transforms; 0 does not crop.
    flip : bool
        Whether to mirror half of the images.
    seed : int
        The study's seed. Nothing else decides the draws, so arms see the same batches.
    rand_augment : int
        Strength of :mod:`~rethink_prune.data.rand_augment`, after crop and flip; 0: without.

    Examples
    --------
    >>> array = ImageArray(torch.zeros(4, 2, 2, 1, dtype=torch.uint8), torch.arange(4))
    >>> normalize = Normalization([0.5], [0.5], image_size=2, device=torch.device("cpu"))
    >>> images = DeviceImages(array, normalize, pad=1, flip=True)
    >>> [labels.tolist() for _, labels in images.evaluate([slice(0, 3), slice(3, 4)])]
    [[0, 1, 2], [3]]
    """

    def __init__(
        self,
        images: ImageArray,
        normalize: Normalization,
        *,
        pad: int = 0,
        flip: bool = False,
        seed: int = 0,
        rand_augment: int = 0,
    ) -> None:
        self._pixels = images.images.to(normalize.device)
        self._labels = images.labels.to(normalize.device)
        self._normalize = normalize
        self._pad = pad
        self._flip = flip
        self._seed = seed
        self._magnitude = rand_augment
        self._padded_size = images.images.shape[1] + 2 * pad  # images are square
        # A GPU takes as long to start the work for one batch as for many. A CPU is fastest with what fits its caches.
        of_image = images.images[0].numel() * torch.float32.itemsize
        self._at_once = _BYTES_AT_ONCE // of_image if self._pixels.is_cuda else 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def evaluate(self, parts: Sequence[slice]) -> Iterator[Batch]:
        """Yield a batch for every part of the images in their own order, not augmented."""
        for part in parts:
            yield self._normalize(self._pixels[part]), self._labels[part]

    def train(self, epoch: int, parts: Sequence[torch.Tensor]) -> Iterator[Batch]:
        """Yield a batch for every part of the shuffled and augmented epoch; a part holds positions, int64."""
        blocks = blocks_of([len(part) for part in parts], self._at_once)
        sizes, positions = [sum(block) for block in blocks], torch.cat(list(parts))
        orders, windows = self._plan(epoch, positions, sizes)
        operations = self._draw_operations(epoch)[positions].split(sizes)
        for block, order, window, drawn in zip(blocks, orders, windows, operations, strict=True):
            pixels = self._pixels.index_select(0, order)
            if self._pad or self._flip:
                pixels = self._augment(pixels, window)
            if self._magnitude:
                pixels = apply_operations(pixels, drawn, magnitude=self._magnitude)
            labels = self._labels.index_select(0, order)
            yield from zip(self._normalize(pixels).split(block), labels.split(block), strict=True)

    def _draw_operations(self, epoch: int) -> torch.Tensor:
        """Return the operations of every position, on the CPU; none for each without `rand_augment`."""
        if not self._magnitude:
            return torch.empty(len(self), 0, dtype=torch.int64)
        return draw_operations(len(self), derive_generator(self._seed, "rand_augment", epoch))

    def _plan(
        self, epoch: int, positions: torch.Tensor, sizes: Sequence[int]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return, for blocks of these sizes, which images they hold and, for `_augment`, where each one's crop starts.

        The blocks follow each other in the sequence of `positions`.
        """
        draws = draw_epoch(len(self), pad=self._pad, flip=self._flip, seed=self._seed, epoch=epoch)
        # Crops are cut out of one block: what counts is an image's place there.
        place = torch.cat([torch.arange(size) for size in sizes])
        if self._flip:
            place = 2 * place + draws.flip[positions]
        windows = (place * self._padded_size + draws.top[positions]) * self._padded_size + draws.left[positions]
        plan = torch.stack([draws.order[positions], windows])
        if self._pixels.is_cuda:
            # Pinned, so that the host does not wait for the copy, which is the only one in an epoch.
            plan = plan.pin_memory().to(self._pixels.device, non_blocking=True)
        return plan[0].split(list(sizes)), plan[1].split(list(sizes))

    def _augment(self, images: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Cut every image's crop out of the padded block: uint8, B x H x W x C, in and out.

        A crop is a window of the padded block that starts at a certain pixel and steps down by padded rows. With flips,
        the padded block holds each image next to its mirror image, and the window chooses between them.
        """
        batch, height, width, channels = images.shape
        size, variants = self._padded_size, 2 if self._flip else 1
        padded = images.new_zeros(batch, variants, size, size, channels)
        inner = padded[:, :, self._pad : self._pad + height, self._pad : self._pad + width]
        inner[:, 0] = images
        if self._flip:
            inner[:, 1] = images.flip(2)
        # All windows together are one overlapping view: a single gather then takes the wanted ones in whole rows. The
        # last window starts 2 * pad rows and columns into the last image.
        starts = ((batch * variants - 1) * size + 2 * self._pad) * size + 2 * self._pad + 1
        views = padded.as_strided((starts, height, width * channels), (channels, size * channels, 1))
        return views.index_select(0, windows).view(images.shape)
