"""Batches from images that live on the device as bytes, augmented there a whole batch at a time.

The draws of an epoch (order, crop offsets, flips) are made at once and belong to positions in the epoch, not
to batches: they are the same for every batch size, and an epoch taken up in its middle goes on as if it had
never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rethink_prune.data.contract import AnyTrainBatches
from rethink_prune.data.shard import DividedEpoch, Shared
from rethink_prune.data.split import Split
from rethink_prune.seeds import derive_generator


@dataclass(frozen=True)
class EpochDraws:
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
    """Draw order, crops and flips of an epoch, on the CPU, from ``(seed, epoch)`` alone."""
    order = torch.randperm(images, generator=derive_generator(seed, "order", epoch))
    augmentation = derive_generator(seed, "augmentation", epoch)
    top, left = torch.randint(0, 2 * pad + 1, (2, images), generator=augmentation)
    mirrored = torch.randint(0, 2, (images,), generator=augmentation).bool()
    return EpochDraws(order, top, left, mirrored & flip)


class Normalization:
    """Turns bytes into the network's input: ``(x / 255 - mean) / std``, float32, channels last.

    Parameters
    ----------
    mean, std : sequence of float
        One value per channel, on the [0, 1] scale.
    width : int
        Image width in pixels.
    device : torch.device
        Where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, width: int, device: torch.device) -> None:
        # One value per entry of a pixel row, not per channel: a last axis of 3 is too short to vectorise.
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).repeat(width)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).repeat(width)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8, N x H x W x C, to float32, N x C x H x W in channels_last memory."""
        rows = images.flatten(2).to(torch.float32)
        rows.div_(255).sub_(self._mean).div_(self._std)
        return rows.view(images.shape).permute(0, 3, 1, 2)


class TrainBatches(DividedEpoch):
    """Shuffled batches with the usual augmentation: zero padding, random crop, horizontal flip.

    Padding is black before normalisation, as in the usual torchvision transforms.

    Parameters
    ----------
    split : Split
        The training images.
    mean, std : sequence of float
        Per channel, on the [0, 1] scale.
    batch_size : int
        Images per batch.
    pad : int
        Pixels of padding on each side; 0 does not crop.
    flip : bool
        Whether to mirror half of the images.
    device : torch.device
        Where the images are kept and the batches made.
    seed : int
        The study's seed. Nothing else decides the draws, so arms see the same batches.

    Raises
    ------
    UserError
        As :class:`~rethink_prune.data.shard.DividedEpoch` does.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        pad: int,
        flip: bool,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__(len(split), batch_size)
        self._images = split.images.to(device)
        self._labels = split.labels.to(device)
        self._pad = pad
        self._flip = flip
        self._seed = seed
        self._normalize = Normalization(mean, std, width=split.images.shape[2], device=device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an epoch, or this process's part of each.

        Parameters
        ----------
        epoch : int
            Which epoch's draws to use.
        start_step : int
            Batches to leave out at the start: those a resumed run has done already.

        Yields
        ------
        images : torch.Tensor
            float32, B x C x H x W, normalised, in channels_last memory.
        labels : torch.Tensor
            int64, B.
        """
        order, windows = self._plan(epoch)
        for step in range(start_step, self.steps_per_epoch):
            batch = self.positions(step)
            images = self._images.index_select(0, order[batch])
            if self._pad or self._flip:
                images = self._augment(images, windows[batch])
            yield self._normalize(images), self._labels.index_select(0, order[batch])

    def _plan(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the order of an epoch and, for `_augment`, the pixel at which each image's crop starts."""
        draws = draw_epoch(len(self._labels), pad=self._pad, flip=self._flip, seed=self._seed, epoch=epoch)
        height, width = self._padded_size()
        used = self.images_per_epoch
        firsts = torch.tensor([self.positions(step).start for step in range(self.steps_per_epoch)])
        slot = torch.arange(used) - firsts.repeat_interleave(self._batch_size)[:used]
        if self._flip:
            slot = 2 * slot + draws.flip[:used]
        plan = torch.stack([draws.order[:used], (slot * height + draws.top[:used]) * width + draws.left[:used]])
        if self._images.is_cuda:
            # Pinned, so that the copy waits for nothing; it is the only one in an epoch.
            plan = plan.pin_memory().to(self._images.device, non_blocking=True)
        order, windows = plan.to(self._images.device)
        return order, windows

    def _padded_size(self) -> tuple[int, int]:
        _, height, width, _ = self._images.shape
        return height + 2 * self._pad, width + 2 * self._pad

    def _augment(self, images: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Cut every image's crop out of the padded batch: uint8, B x H x W x C, in and out.

        A crop is a window of the padded batch that starts at a certain pixel and steps down by padded rows.
        All windows together are one overlapping view, from which a single gather takes the wanted ones in
        whole rows. With flips, the padded batch holds each image next to its mirror image, and the window
        chooses between them.
        """
        batch, height, width, channels = images.shape
        padded_height, padded_width = self._padded_size()
        variants = 2 if self._flip else 1
        padded = images.new_zeros(batch, variants, padded_height, padded_width, channels)
        inner = padded[:, :, self._pad : self._pad + height, self._pad : self._pad + width]
        inner[:, 0] = images
        if self._flip:
            inner[:, 1] = images.flip(2)
        # The last window starts 2 * pad rows and columns into the last image.
        starts = ((batch * variants - 1) * padded_height + 2 * self._pad) * padded_width + 2 * self._pad + 1
        views = padded.as_strided((starts, height, width * channels), (channels, padded_width * channels, 1))
        return views.index_select(0, windows).view(images.shape)


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch, to be gone through any number of times.

    Attributes
    ----------
    batches : AnyTrainBatches
    epoch : int
        Which epoch's order and augmentation.
    """

    batches: AnyTrainBatches
    epoch: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches.epoch(self.epoch)


class EvalBatches(Shared):
    """Every image exactly once, in order, unchanged but for normalisation.

    Parameters
    ----------
    split : Split
        The images.
    mean, std : sequence of float
        Per channel, on the [0, 1] scale.
    batch_size : int
        Images per batch; the last may be smaller.
    device : torch.device
        Where the images are kept and the batches made.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._images = split.images.to(device)
        self._labels = split.labels.to(device)
        self._batch_size = batch_size
        self._normalize = Normalization(mean, std, width=split.images.shape[2], device=device)

    def __len__(self) -> int:
        """Return the number of images, of all processes together."""
        return len(self._labels)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (float32, B x C x H x W, channels_last) and labels (int64, B)."""
        part = self._shard.of(0, len(self))
        for start in range(part.start, part.stop, self._batch_size):
            batch = slice(start, min(start + self._batch_size, part.stop))
            yield self._normalize(self._images[batch]), self._labels[batch]
