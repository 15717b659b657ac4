"""Removing stages from a store while other processes may ask for them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from rethink_prune.store.listing import StageState
from rethink_prune.store.ownership import LOCK_FILE

# Begins the name of a stage that is being removed; a name with a dot is not listed.
_PREFIX = ".removed-"


def remove_stages(stages: Sequence[StageState]) -> list[StageState]:
    """Remove stages from their store, except those that a process works on by now; return what is gone."""
    removed = []
    for stage in stages:
        try:
            # Held until the lock file is gone, too: a process that waits for it then sees that, and makes a new one.
            with FileLock(stage.folder / LOCK_FILE, blocking=False):
                # Renamed first, which takes no time: from then on, a process that asks for the stage makes a new one.
                doomed = stage.folder.with_name(f"{_PREFIX}{stage.folder.name}-{uuid.uuid4().hex[:8]}")
                stage.folder.rename(doomed)
                shutil.rmtree(doomed)
        except Timeout:
            continue
        removed.append(stage)
    return removed


def finish_removals(root: Path) -> None:
    """Remove what earlier removals from the store `root` left behind because they were stopped halfway."""
    for doomed in (root / "stages").glob(f"{_PREFIX}*"):
        # Another process may remove it at the same time.
        shutil.rmtree(doomed, ignore_errors=True)
