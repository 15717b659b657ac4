"""The state of an unfinished training: the newest checkpoint and the one before.

A file's name holds the epoch, the step and the SHA-256 of its content, so one atomic rename publishes a checkpoint
together with its checksum. Loading executes nothing (``weights_only=True``).
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rethink_prune.files import write_atomically

log = logging.getLogger(__name__)

KEPT = 2


class Checkpoints:
    """The checkpoints of one stage.

    Parameters
    ----------
    folder : Path
        The stage's folder.
    still_owner : callable
        Called before every write; raises if the stage has been taken over by another process.
    """

    def __init__(self, folder: Path, still_owner: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._still_owner = still_owner

    def files(self) -> list[Path]:
        """Return the checkpoint files, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any], *, epoch: int, step: int) -> None:
        """Write `state` as the newest checkpoint and remove all but the one before."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        self._still_owner()
        before = self.files()
        name = f"checkpoint-{epoch:06d}-{step:08d}-{digest[:16]}.pt"
        write_atomically(self.folder / name, content)
        for path in before[: -(KEPT - 1)]:
            if path.name != name:
                path.unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """Return the newest intact state, or None; a damaged file is named and passed over."""
        for path in reversed(self.files()):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rsplit("-", 1)[-1]:
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            log.warning("%s is damaged (its checksum does not match): going back to the state before it", path)
            path.unlink()
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in self.files():
            path.unlink()
