"""The processes that read images, from their start to the errors that a user is told when one dies."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader

from rethink_prune.data.memory import MORE_SHARED_MEMORY, check_shared_memory
from rethink_prune.data.reader import BatchReader, RawBatch, ReadRequest
from rethink_prune.errors import UserError

_PREFETCH = 2  # batches under way per worker
_MOST_WORKERS = 16
_GRACE = 10  # seconds for which a worker goes on after a SIGTERM
_DYING = 2.0  # seconds that a dying worker may take


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
        try:
            iterator = iter(self._loader)
        finally:
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
