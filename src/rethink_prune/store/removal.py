"""Removing stages from a store while other processes may ask for them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from rethink_prune.store.ownership import LOCK_FILE

# Begins the name of a stage that is being removed.
REMOVED_PREFIX = ".removed-"


def remove_stages(folders: Sequence[Path]) -> list[Path]:
    """Remove the folders of stages, except those that a process works on by now; return what is gone."""
    removed = []
    for folder in folders:
        try:
            # Held until the lock file is gone, too: a process that waits for it then sees that, and makes a new one.
            with FileLock(folder / LOCK_FILE, blocking=False):
                # Renamed first, which takes no time: from then on, a process that asks for the stage makes a new one.
                doomed = folder.with_name(f"{REMOVED_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}")
                folder.rename(doomed)
                shutil.rmtree(doomed)
        except Timeout:
            continue
        removed.append(folder)
    return removed


def finish_removals(root: Path) -> None:
    """Remove what earlier removals from the store `root` left behind because they were stopped halfway."""
    for doomed in (root / "stages").glob(f"{REMOVED_PREFIX}*"):
        # Another process may remove it at the same time.
        shutil.rmtree(doomed, ignore_errors=True)
