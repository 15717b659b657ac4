"""Batches from image files: workers decode, crop and resize to bytes; the device mirrors and normalises.

What is drawn for an image (its crop, whether it is mirrored) belongs to its position in the epoch, so batches depend
neither on the number of workers nor on how many processes share them, and an epoch taken up in its middle goes on as if
it had never stopped.
"""

from __future__ import annotations

import errno
import io
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rethink_prune.data.batches import Normalization
from rethink_prune.data.decoding import convert, reason
from rethink_prune.data.shard import DividedEpoch, Shared
from rethink_prune.data.split import Files
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator

PREFETCH = 2  # batches under way per worker
_MOST_WORKERS = 16
_GRACE = 10  # seconds for which a worker goes on after a SIGTERM
_DYING = 2.0  # seconds that a dying worker may take
_SHARED_MEMORY = Path("/dev/shm")
_MORE_SHARED_MEMORY = (
    "set dataset.workers=0 or to fewer, or enlarge it "
    "(mount -o remount,size=8g /dev/shm; for a container, --shm-size=8g)"
)
# Random crops as the paper has them, and GoogLeNet before (arXiv:1409.4842): share of the area, width by height.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_RGB = 3  # torchvision's ImageReadMode.RGB
# The scale of tests: of an image whose shorter side is 256, the central 224.
_MARGIN = 256 / 224


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Place(NamedTuple):
    """Which image, and where in training it comes: what its random draws depend on."""

    image: int
    epoch: int
    position: int


class RawBatch(NamedTuple):
    """What a worker makes: uint8 B x H x W x C, int64 B, and bool B, whether to mirror."""

    images: torch.Tensor
    labels: torch.Tensor
    mirrored: torch.Tensor


class Fault(NamedTuple):
    """What keeps a worker from making a batch, as a user is told."""

    message: str


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Return the part of a training image to use: of 8 % to all of its area and of aspect 3/4 to 4/3.

    Parameters
    ----------
    width, height : int
        Of the image.
    draws : sequence of float
        22 numbers in [0, 1): where the part is, and area and aspect of ten attempts. If none of these fits in the
        image, the largest central part of an allowed aspect is taken.
    """
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for attempt in range(_ATTEMPTS):
        area_draw, aspect_draw = draws[2 + 2 * attempt : 4 + 2 * attempt]
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1)), w, h)
    w = min(width, max(1, round(height * _ASPECT[1])))
    h = min(height, max(1, round(width / _ASPECT[0])))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def read_box(path: Path, size: int, choose: Callable[[int, int], Box]) -> torch.Tensor:
    """Decode the part of an image that `choose` says for its width and height, resized to uint8, size x size x 3.

    Where the part is at least twice as wide and as high as it will be, a JPEG is decoded at a half, a quarter or an
    eighth of its size, which costs as much less; the part then begins and ends at whole pixels of that size.
    """
    content = np.fromfile(path, dtype=np.uint8)
    with Image.open(io.BytesIO(content.data)) as image:
        width, height = image.size
        box = choose(width, height)
        image.draft(None, (math.ceil(width * size / box.width), math.ceil(height * size / box.height)))
        pixels = _decode(image, content, whole=image.size == (width, height))
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    left, top = round(box.left * across), round(box.top * down)
    right, bottom = round((box.left + box.width) * across), round((box.top + box.height) * down)
    return _resize(pixels[top : max(top + 1, bottom), left : max(left + 1, right)], height=size, width=size)


def read_centre(path: Path, size: int) -> torch.Tensor:
    """Decode an image whole, resize its shorter side to 256 and cut out the central 224, or in that proportion."""
    content = np.fromfile(path, dtype=np.uint8)
    with Image.open(io.BytesIO(content.data)) as image:
        pixels = _decode(image, content, whole=True)
    shape = pixels.shape[:2]
    height, width = (round(size * _MARGIN) * length // min(shape) for length in shape)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(pixels, height=height, width=width)[top : top + size, left : left + size]


def _decode(image: Image.Image, content: npt.NDArray[np.uint8], *, whole: bool) -> torch.Tensor:
    """Decode an image that Pillow has opened to uint8, H x W x 3."""
    decoder = _jpeg_decoder()
    if whole and decoder is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
        return decoder(torch.from_numpy(content), _RGB, False).permute(1, 2, 0)
    return torch.from_numpy(np.array(convert(image, 3)))


@cache
def _jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """Return torchvision's decoder, a tenth faster than Pillow's; None for versions that have it no longer."""
    try:
        import torchvision.io  # noqa: F401  registers the operator; takes seconds to import

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None


def _resize(pixels: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    # Torch's resize does the arithmetic of Pillow's with vector instructions, several times as fast. The batch's
    # dimension comes before the change of order: otherwise the result is channels-first, and copied slowly.
    images = pixels.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)


class _Reader(Dataset[RawBatch]):
    """Reads whole batches: what a worker does.

    Parameters
    ----------
    files : Files
        The images.
    size : int
        Height and width of the result.
    seed : int
        The study's seed.
    augment : bool
        Take random parts instead of the centre.
    flip : bool
        Mirror half of the images.
    """

    def __init__(self, files: Files, *, size: int, seed: int = 0, augment: bool = False, flip: bool = False) -> None:
        self._files = files
        self._size = size
        self._seed = seed
        self._augment = augment
        self._flip = flip
        _jpeg_decoder()  # imported once, not by every worker

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, places: Sequence[Place]) -> RawBatch | Fault:
        count, size = len(places), self._size
        batch = RawBatch(
            images=torch.empty(count, size, size, 3, dtype=torch.uint8),
            labels=self._files.labels[[place.image for place in places]],
            mirrored=torch.zeros(count, dtype=torch.bool),
        )
        if get_worker_info() is not None:
            try:
                # As sending would do, where a failure would go unheard and the training would wait for ever.
                for tensor in batch:
                    tensor.share_memory_()
            except RuntimeError as error:
                return Fault(f"dataset.workers: {error}; {_MORE_SHARED_MEMORY}")
        for row, place in enumerate(places):
            name = self._files.name(place.image)
            try:
                batch.images[row], batch.mirrored[row] = self._read(self._files.root / name, place)
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                return Fault(
                    f"dataset.root={self._files.root}: {name} cannot be read ({reason(error)}); nothing finished is "
                    "lost: put an intact file there and run the same command again"
                )
        return batch

    def _read(self, path: Path, place: Place) -> tuple[torch.Tensor, bool]:
        generator = derive_generator(self._seed, "augmentation", place.epoch, place.position)
        mirror, *where = torch.rand(3 + 2 * _ATTEMPTS, generator=generator, dtype=torch.float64).tolist()
        if self._augment:
            pixels = read_box(path, self._size, lambda width, height: random_box(width, height, where))
        else:
            pixels = read_centre(path, self._size)
        return pixels, self._flip and mirror < 0.5


class _Plan:
    """The batches of the pass that is under way, for a loader to go through."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Place]] = ()

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.batches)


class _Stream:
    """Raw batches from workers that stay from one pass to the next.

    Parameters
    ----------
    reader : _Reader
        Makes a batch.
    batch_bytes : int
        Size of one.
    device : torch.device
        Where batches go afterwards.
    workers : int
        Processes; 0 reads in this one.
    prefetch : int
        Batches under way per worker.
    """

    def __init__(self, reader: _Reader, *, batch_bytes: int, device: torch.device, workers: int, prefetch: int) -> None:
        if workers:
            _check_shared_memory(workers, workers * prefetch * batch_bytes)
        self._reader = reader
        self._pin = device.type == "cuda"
        self._workers = workers
        self._prefetch = prefetch
        self._plan = _Plan()
        self._loader: DataLoader[RawBatch] | None = None
        self._processes: list[BaseProcess] = []

    def run(self, plan: Iterable[list[Place]]) -> Iterator[RawBatch]:
        """Yield the batches of a plan, in its order; raises `UserError` for whatever stops the workers."""
        self._plan.batches = plan
        try:
            for batch in self._start():
                if isinstance(batch, Fault):
                    raise UserError(batch.message)
                yield batch
        # What the loader raises for workers that died or do not start.
        except (RuntimeError, OSError, EOFError) as error:
            self._loader = None
            self._wait_for_the_dying()
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            if full or any(process.exitcode == -signal.SIGBUS for process in self._processes):
                raise UserError(f"dataset.workers: /dev/shm is full; {_MORE_SHARED_MEMORY}") from error
            if any(process.exitcode for process in self._processes):
                raise UserError(
                    "dataset.workers: a process that reads images died (killed, or out of memory: then set "
                    f"dataset.workers below {self._workers}); nothing finished is lost: run the same command again"
                ) from error
            raise

    def _wait_for_the_dying(self) -> None:
        """Wait until a worker has ended, for a moment: its connection can break before the system knows how it died."""
        if any(process.exitcode for process in self._processes):
            return
        living = [process for process in self._processes if process.exitcode is None]
        ended = wait([process.sentinel for process in living], timeout=_DYING)
        for process in living:
            if process.sentinel in ended:
                process.join()  # it has closed its files, but may not have ended yet

    def _start(self) -> Iterator[RawBatch | Fault]:
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_sampler=self._plan,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                pin_memory=self._pin,
                worker_init_fn=_outlive_signals,
                persistent_workers=self._workers > 0,
                prefetch_factor=self._prefetch if self._workers else None,
            )
        # The loader would have a worker's death raise an error at any point of a training step, in a signal handler.
        # Without it, the death is noticed where the next batch is waited for.
        others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):  # of a loader before
            handler = signal.SIG_DFL
        try:
            iterator = iter(self._loader)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)
        self._processes += [process for process in multiprocessing.active_children() if process not in others]
        return iterator


class StreamBatches(DividedEpoch):
    """Shuffled batches of random crops, resized and mirrored: the usual augmentation for ImageNet.

    The interface is that of :class:`~rethink_prune.data.batches.TrainBatches`.

    Parameters
    ----------
    files : Files
        The training images.
    mean, std : sequence of float
        Per channel, on the [0, 1] scale.
    image_size : int
        Height and width in pixels.
    batch_size : int
        Images per batch, of all processes together.
    augment : bool
        Random crops; otherwise the centre, as in tests.
    flip : bool
        Whether to mirror half of the images.
    device : torch.device
        Where the batches go.
    seed : int
        The study's seed.
    workers : int or None
        Processes that read images; 0 reads in this one, None takes one for every core, at most 16.
    prefetch : int
        Batches under way per worker.

    Raises
    ------
    UserError
        As :class:`~rethink_prune.data.shard.DividedEpoch` does; or shared memory is too small for the workers.
    """

    def __init__(
        self,
        files: Files,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        batch_size: int,
        augment: bool,
        flip: bool,
        device: torch.device,
        seed: int,
        workers: int | None = None,
        prefetch: int = PREFETCH,
    ) -> None:
        super().__init__(len(files), batch_size)
        self._images = len(files)
        self._seed = seed
        self._device = device
        self._normalize = Normalization(mean, std, width=image_size, device=device)
        self._stream = _Stream(
            _Reader(files, size=image_size, seed=seed, augment=augment, flip=flip),
            batch_bytes=batch_size * image_size**2 * 3,
            device=device,
            workers=default_workers() if workers is None else workers,
            prefetch=prefetch,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an epoch, or this process's part of each, from a step on.

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

        Raises
        ------
        UserError
            An image cannot be read, a worker died, or there is no room in shared memory.
        """
        for raw in self._stream.run(self._plan(epoch, start_step)):
            images, labels, mirrored = (part.to(self._device, non_blocking=True) for part in raw)
            # Taking whole images costs less than choosing pixel by pixel.
            either = torch.cat([images, images.flip(2)])
            chosen = torch.arange(len(labels), device=self._device) + len(labels) * mirrored
            yield self._normalize(either.index_select(0, chosen)), labels

    def _plan(self, epoch: int, start_step: int) -> Iterator[list[Place]]:
        order = torch.randperm(self._images, generator=derive_generator(self._seed, "order", epoch))
        for step in range(start_step, self.steps_per_epoch):
            part = self.positions(step)
            images = order[part].tolist()
            yield [Place(image, epoch, part.start + row) for row, image in enumerate(images)]


class StreamEvalBatches(Shared):
    """Every image exactly once, in order: the centre, as ImageNet is tested on.

    The interface is that of :class:`~rethink_prune.data.batches.EvalBatches`.

    Parameters
    ----------
    files, mean, std, image_size, device, workers, prefetch
        As for :class:`StreamBatches`.
    batch_size : int
        Images per batch; the last may be smaller.
    """

    def __init__(
        self,
        files: Files,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        batch_size: int,
        device: torch.device,
        workers: int | None = None,
        prefetch: int = PREFETCH,
    ) -> None:
        self._images = len(files)
        self._batch_size = batch_size
        self._device = device
        self._normalize = Normalization(mean, std, width=image_size, device=device)
        self._stream = _Stream(
            _Reader(files, size=image_size),
            batch_bytes=batch_size * image_size**2 * 3,
            device=device,
            workers=default_workers() if workers is None else workers,
            prefetch=prefetch,
        )

    def __len__(self) -> int:
        """Return the number of images, of all processes together."""
        return self._images

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (float32, B x C x H x W, channels_last) and labels (int64, B); raises as training does."""
        for raw in self._stream.run(self._plan()):
            images, labels, _ = (part.to(self._device, non_blocking=True) for part in raw)
            yield self._normalize(images), labels

    def _plan(self) -> Iterator[list[Place]]:
        part = self._shard.of(0, self._images)
        for start in range(part.start, part.stop, self._batch_size):
            yield [Place(image, 0, image) for image in range(start, min(start + self._batch_size, part.stop))]


def default_workers() -> int:
    """Return one worker for every core this process may use, at most 16; processes of one machine share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return min(_MOST_WORKERS, max(1, cores // processes))


def _check_shared_memory(workers: int, needed: int) -> None:
    if not _SHARED_MEMORY.exists():  # not Linux
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"dataset.workers={workers}: batches on their way from the workers need {needed / 2**20:.0f} MiB of "
            f"{_SHARED_MEMORY}, which has {free / 2**20:.0f} MiB left; {_MORE_SHARED_MEMORY}"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    # Ctrl-C and batch systems signal all processes, but the study wants to finish its step and save first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(_GRACE))
