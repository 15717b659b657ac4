"""Save the state of an unfinished training, and go on from it.

The name of a checkpoint's file holds the epoch, the step and the SHA-256 of the content, so one atomic rename
publishes a checkpoint together with its checksum.
"""

import hashlib
import io
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from rethink_prune.files import write_atomically
from rethink_prune.state import full_state, load_full_state
from rethink_prune.training.distributed import Processes
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress

log = logging.getLogger(__name__)

# The newest checkpoint, and the one before in case the newest is damaged.
KEPT = 2

Parts = Mapping[str, nn.Module | Optimizer | lr_scheduler.LRScheduler]


class Checkpoints:
    """The checkpoints of one stage.

    Parameters
    ----------
    folder : Path
        The stage's folder.
    still_owner : callable
        Called before every write; raises if the stage has been taken over by another process.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(Path(folder))
    ...     for step in (1, 2, 3):
    ...         checkpoints.save({"step": step}, epoch=0, step=step)
    ...     len(checkpoints.files()), checkpoints.latest()
    (2, {'step': 3})
    """

    def __init__(self, folder: Path, still_owner: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._still_owner = still_owner

    def files(self) -> list[Path]:
        """Return the checkpoint files, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any], *, epoch: int, step: int) -> None:
        """Write `state` as the newest checkpoint and remove all but the one before."""
        # In memory first: the name needs the checksum of the whole content.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        self._still_owner()
        write_atomically(self.folder / f"checkpoint-{epoch:06d}-{step:08d}-{digest[:16]}.pt", content)
        for path in self.files()[:-KEPT]:
            path.unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """Return the newest intact state, or None; name a damaged file in the log and remove it."""
        for path in reversed(self.files()):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rsplit("-", 1)[-1]:
                # On the CPU, so that the device has no second copy of the weights while they are loaded.
                # With `weights_only`, loading a file executes nothing, whoever wrote it.
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            log.warning("%s is damaged (its checksum does not match): going back to the state before it", path)
            path.unlink()
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in self.files():
            path.unlink()


@dataclass
class TrainingSaver:
    """Restores a training from its newest checkpoint, and writes new ones.

    Attributes
    ----------
    parts : mapping of str to Module, Optimizer or LRScheduler
        What a checkpoint holds beside the `Progress`, by the names it has there.
    checkpoints : Checkpoints or None
        None for all but the first process, which saves for all of them.
    interval : float
        At least this many seconds between two checkpoints.
    """

    parts: Parts
    checkpoints: Checkpoints | None
    interrupts: Interrupts
    processes: Processes
    interval: float
    _start: float = field(default_factory=time.monotonic)
    _last_save: float = field(default_factory=time.monotonic)

    def restore(self) -> Progress:
        """Load the newest checkpoint, if there is one, into the parts; return where the training stands."""
        state = self.processes.broadcast(self.checkpoints.latest() if self.checkpoints else None)
        if state is None:
            return Progress()
        for name, part in self.parts.items():
            saved = state.pop(name)
            if isinstance(part, nn.Module):
                load_full_state(part, saved)
            else:
                part.load_state_dict(saved)
        progress = Progress(**state)
        if not self.processes.is_first:
            # The saved totals are sums over all processes: they count once, in the first one.
            progress.totals.zero_()
        self._start -= progress.seconds
        return progress

    def seconds(self) -> float:
        """Return how long the training has run, stopped runs included."""
        return time.monotonic() - self._start

    def pause(self, progress: Progress, title: str, epochs: int) -> None:
        """Save if it is time; save and raise `Interrupted` if a signal came to any process."""
        overdue = time.monotonic() - self._last_save >= self.interval
        # One process may have got the signal, or have the slower clock: all of them have to do the same.
        signum, due = self.processes.max(self.interrupts.requested or 0, int(overdue))
        if signum or due:
            self._save(progress)
        if signum:
            self.interrupts.requested = signum
            self.interrupts.stop(f"in {title}, epoch {progress.epoch + 1} of {epochs}")

    def _save(self, progress: Progress) -> None:
        progress.seconds = self.seconds()
        # Every process takes part in the sum; the first one writes.
        totals = self.processes.sum(progress.totals)
        if self.checkpoints is not None:
            parts = {
                name: full_state(part) if isinstance(part, nn.Module) else part.state_dict()
                for name, part in self.parts.items()
            }
            # Earlier versions wrote the same names: their checkpoints can be read, and they can read these.
            state = {**vars(replace(progress, totals=totals)), **parts}
            self.checkpoints.save(state, epoch=progress.epoch, step=progress.step)
        self._last_save = time.monotonic()
