"""What is in a store: the state, progress and size of every stage."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rethink_prune.errors import UserError
from rethink_prune.store.metrics import read_metrics, steady_pace
from rethink_prune.store.ownership import STALE_SECONDS
from rethink_prune.store.stage import Stage
from rethink_prune.store.store import Store
from rethink_prune.text import duration, markdown, size

# In the order of the table: what wants attention first. A stage whose process died is stale, one without a readable
# status unfinished.
State = Literal["running", "stale", "failed", "stopped", "unfinished", "done"]
STATES: tuple[State, ...] = get_args(State)
COLUMNS = ("state", "stage", "network", "epoch", "remaining", "disk", "note")


@dataclass(frozen=True)
class StageState:
    """One stage of a store.

    Attributes
    ----------
    network : str
        Which network, and in brackets which part of a study.
    epoch, epochs : int
        Done, and to be done; 0 if it trains nothing.
    remaining : float or None
        Seconds of training that are left, at its steady pace; None where that is not known, as in the first two epochs.
    disk : int
        Bytes in its folder.
    note : str
        Why it failed, or which process works on it.
    referenced : bool
        Whether a run whose folder is still there uses it.
    """

    folder: Path
    state: State
    network: str
    epoch: int
    epochs: int
    remaining: float | None
    disk: int
    note: str
    referenced: bool

    @property
    def removable(self) -> bool:
        """Whether no result is lost with it: nobody works on it, and it is unfinished or used by no run."""
        return self.state != "running" and (self.state != "done" or not self.referenced)


def list_stages(root: Path) -> list[StageState]:
    """Return the stages of the store `root`, in the order of `STATES`, then by name.

    Raises
    ------
    UserError
        If `root` is no store, or a later version's.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     store = Store(Path(folder))
    ...     store.prepare()
    ...     store.stage("large-0123").folder.mkdir()
    ...     [(stage.state, stage.folder.name) for stage in list_stages(store.root)]
    [('unfinished', 'large-0123')]
    """
    Store(root).check()
    folder = root / "stages"
    if not folder.is_dir():
        raise UserError(f"{root}: is no store: it has no folder stages")
    used = _used_stages(root)
    found = []
    for path in folder.iterdir():
        # Stages that are being removed have a name with a dot.
        if path.is_dir() and not path.name.startswith("."):
            # Another process may remove the stage at this moment.
            with suppress(FileNotFoundError):
                found.append(_read_stage(Stage(path), path.name in used))
    return sorted(found, key=lambda stage: (STATES.index(stage.state), stage.folder.name))


def stages_table(root: Path, stages: Sequence[StageState]) -> str:
    """Return `stages` as a Markdown table, and a line with the sums and the size of the store's cache."""
    rows = [
        [
            stage.state,
            stage.folder.name,
            stage.network,
            f"{stage.epoch}/{stage.epochs}" if stage.epochs else "",
            "" if stage.remaining is None else duration(stage.remaining),
            size(stage.disk),
            stage.note + ("" if stage.referenced or stage.state != "done" else "used by no run"),
        ]
        for stage in stages
    ]
    counts = ", ".join(f"{n} {s}" for s in STATES if (n := sum(stage.state == s for stage in stages)))
    cache = size(_folder_bytes(root / "cache"))
    total = f"{counts or 'no stages'}; {size(sum(stage.disk for stage in stages))} in stages, {cache} in the cache"
    return f"{markdown(COLUMNS, rows)}\n\n{total}" if rows else total


def _read_stage(stage: Stage, referenced: bool) -> StageState:
    status, config, rows = stage.status(), stage.config(), read_metrics(stage.folder)
    state: State = status["state"] if status.get("state") in STATES else "unfinished"
    if state == "running":
        silence = time.time() - (stage.folder / "status.json").stat().st_mtime
        state = "stale" if silence > STALE_SECONDS or _process_is_gone(status) else "running"
    process = f"process {status.get('pid')} on {status.get('host')}"
    notes = {"failed": str(status.get("reason", "")), "running": f"{process} works on it", "stale": f"{process} died"}
    epochs = int(((config.get("key") or {}).get("training") or {}).get("epochs", 0))
    pace = steady_pace(rows) if state == "running" and epochs else None
    return StageState(
        folder=stage.folder,
        state=state,
        network=f"{(config.get('network') or {}).get('name', '')} ({config['title']})" if "title" in config else "",
        epoch=len(rows),
        epochs=epochs,
        remaining=None if pace is None else pace * (epochs - len(rows)),
        disk=_folder_bytes(stage.folder),
        note=notes.get(state, ""),
        referenced=referenced,
    )


def _process_is_gone(status: Mapping[str, Any]) -> bool:
    """Tell whether the process that worked on a stage has ended, as far as this machine can know."""
    # A process that belongs to another user exists, too.
    with suppress(PermissionError):
        try:
            # Signal 0 is not sent: the call only checks that the process exists.
            if status.get("host") == socket.gethostname():
                os.kill(int(status["pid"]), 0)
        except ProcessLookupError:
            return True
    return False


def _used_stages(root: Path) -> set[str]:
    """Return the names of the stages that runs use whose folders are still there."""
    used: set[str] = set()
    for record in (root / "runs").glob("*.json"):
        # A record that is damaged, or being written at this moment, says nothing about any stage.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(record.read_text())
            if Path(content["run_dir"]).is_dir():
                used.update(content["stages"].values())
    return used


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A file may go while the folder is read: a checkpoint, say.
        with suppress(OSError):
            total += 0 if path.is_dir() else path.stat().st_size
    return total
