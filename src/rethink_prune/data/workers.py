"""The processes that read images: the batches they make, their start, and what a user is told when one dies."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rethink_prune.data.decoding import (
    CROP_DRAWS,
    Pixels,
    describe_failure,
    jpeg_decoder,
    place_crop,
    read_centre,
    read_crop,
)
from rethink_prune.data.memory import MORE_SHARED_MEMORY, check_shared_memory
from rethink_prune.data.rand_augment import apply_operations, draw_operations
from rethink_prune.data.source import EncodedImages
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator

_PREFETCH = 2  # batches under way per worker
_MOST_WORKERS = 16
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # what tells a study to finish its step and save
_GRACE = 10  # seconds for which a worker goes on after a SIGTERM
_DYING = 2.0  # seconds that a dying worker may take


class ReadRequest(NamedTuple):
    """Which image, and where in training it comes: what its random draws depend on."""

    image: int
    epoch: int
    position: int


class RawBatch(NamedTuple):
    """What a worker makes: uint8 B x H x W x C, int64 B, and bool B, whether to mirror."""

    images: torch.Tensor
    labels: torch.Tensor
    mirrored: torch.Tensor


@dataclass(frozen=True)
class BatchReader(Dataset[RawBatch | UserError]):
    """Decodes, crops and resizes the images of a batch.

    Attributes
    ----------
    files : EncodedImages
        All images.
    image_size : int
        Height and width of the result, in pixels.
    seed : int
        The study's seed.
    augment : bool
        Take random parts instead of the centre.
    flip : bool
        Mirror half of the images.
    rand_augment : int
        Strength of :mod:`~rethink_prune.data.rand_augment`, after crop and flip; 0: without.
    """

    files: EncodedImages
    image_size: int
    seed: int = 0
    augment: bool = False
    flip: bool = False
    rand_augment: int = 0

    def __post_init__(self) -> None:
        jpeg_decoder()  # imported once here, not by every worker

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, requests: Sequence[ReadRequest]) -> RawBatch | UserError:
        """Return one batch, or why there is none."""
        # Errors are returned: those that are raised in a worker come with its traceback.
        count, size = len(requests), self.image_size
        batch = RawBatch(
            images=torch.empty(count, size, size, 3, dtype=torch.uint8),
            labels=self.files.labels[[request.image for request in requests]],
            mirrored=torch.zeros(count, dtype=torch.bool),
        )
        if get_worker_info() is not None:
            try:
                # Sending would do this as well, but in a thread: nobody would notice a failure there, and the training
                # would wait for ever.
                for tensor in batch:
                    tensor.share_memory_()
            except RuntimeError as error:
                return UserError(f"dataset.workers: {error}; {MORE_SHARED_MEMORY}")
        for row, request in enumerate(requests):
            try:
                batch.images[row], batch.mirrored[row] = self._decode(self.files.read(request.image), request)
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                return UserError(
                    f"{self.files.option}: {self.files.name(request.image)} cannot be read "
                    f"({describe_failure(error)}); nothing finished is lost: put an intact file there and run the same "
                    "command again"
                )
        return batch

    def _decode(self, content: Pixels, request: ReadRequest) -> tuple[torch.Tensor, bool]:
        # The draws belong to the position in the epoch: neither the number of workers nor that of processes matters.
        generator = derive_generator(self.seed, "augmentation", request.epoch, request.position)
        mirror, *draws = torch.rand(1 + CROP_DRAWS, generator=generator, dtype=torch.float64).tolist()
        if self.augment:
            pixels = read_crop(content, self.image_size, partial(place_crop, draws=draws))
        else:
            pixels = read_centre(content, self.image_size)
        mirrored = self.flip and mirror < 0.5
        if not self.rand_augment:
            return pixels, mirrored
        # The operations come after the mirror, so that is not left for the device.
        operations = draw_operations(1, derive_generator(self.seed, "rand_augment", request.epoch, request.position))
        pixels = (pixels.flip(1) if mirrored else pixels).unsqueeze(0)
        return apply_operations(pixels, operations, magnitude=self.rand_augment)[0], False


class _CurrentPass:
    """The requests of the pass that is under way: a loader keeps its sampler for good, but not what this one holds."""

    def __init__(self) -> None:
        self.requests: Iterable[list[ReadRequest]] = ()

    def __iter__(self) -> Iterator[list[ReadRequest]]:
        return iter(self.requests)


class WorkerPool:
    """Batches from worker processes that stay from one pass to the next.

    Parameters
    ----------
    reader : BatchReader
        Makes a batch.
    batch_size : int
        Images in the largest batch.
    device : torch.device
        Where batches go afterwards.
    workers : int or None
        Processes; 0 reads in this one, None takes :func:`default_workers`.

    Raises
    ------
    UserError
        Shared memory is too small for the workers.
    """

    def __init__(self, reader: BatchReader, *, batch_size: int, device: torch.device, workers: int | None) -> None:
        self._reader = reader
        self._pin = device.type == "cuda"
        self._workers = default_workers() if workers is None else workers
        if self._workers:
            check_shared_memory(self._workers, self._workers * _PREFETCH * batch_size * reader.image_size**2 * 3)
        self._pass = _CurrentPass()
        self._loader: DataLoader[RawBatch | UserError] | None = None
        self._processes: list[BaseProcess] = []

    def read(self, requests: Iterable[list[ReadRequest]]) -> Iterator[RawBatch]:
        """Yield a batch for each list of requests, in order.

        Raises
        ------
        UserError
            An image cannot be read, a worker died, or there is no room in shared memory.
        """
        self._pass.requests = requests
        try:
            for batch in self._start_pass():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        # What the loader raises for workers that died or do not start.
        except (RuntimeError, OSError, EOFError) as error:
            self._loader = None
            self._wait_for_the_dying()
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            # Without room in shared memory, a process does not start (ENOSPC) or is killed as it writes (SIGBUS).
            if full or any(process.exitcode == -signal.SIGBUS for process in self._processes):
                raise UserError(f"dataset.workers: /dev/shm is full; {MORE_SHARED_MEMORY}") from error
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

    def _start_pass(self) -> Iterator[RawBatch | UserError]:
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_size=None,  # the reader gives whole batches
                sampler=self._pass,
                num_workers=self._workers,
                pin_memory=self._pin,
                worker_init_fn=_outlive_signals,
                persistent_workers=self._workers > 0,  # to start them takes seconds
                prefetch_factor=_PREFETCH if self._workers else None,
            )
        # The loader would have a worker's death raise an error at any point of a training step, in a signal handler.
        # Without it, the death is noticed where the next batch is waited for.
        others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):  # of a loader before
            handler = signal.SIG_DFL
        # A worker that is told to stop before it can outlive that would end without a word.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            iterator = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            if threading.current_thread() is threading.main_thread():  # others may not set handlers
                signal.signal(signal.SIGCHLD, handler)
        self._processes += [process for process in multiprocessing.active_children() if process not in others]
        return iterator


def default_workers() -> int:
    """Return one worker for every core this process may use, at most 16; processes of one machine share the cores.

    Examples
    --------
    >>> 1 <= default_workers() <= 16
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return min(_MOST_WORKERS, max(1, cores // processes))


def _outlive_signals(worker: int) -> None:
    # Ctrl-C and batch systems signal all processes, but the study wants to finish its step and save first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(_GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)  # blocked while workers start
