"""What is in a store: the state, progress and size of every stage."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from rethink_prune.errors import UserError
from rethink_prune.store.metrics import read_metrics, steady_pace
from rethink_prune.store.ownership import STALE_SECONDS, read_status
from rethink_prune.store.stage import Stage
from rethink_prune.store.store import Store
from rethink_prune.text import duration, markdown, size

# In the order of the table: what wants attention first. A stage whose process died is stale, one without a readable
# status unfinished.
State = Literal["running", "stale", "failed", "stopped", "unfinished", "done"]
STATES: tuple[State, ...] = get_args(State)
COLUMNS = ("state", "stage", "network", "epoch", "remaining", "disk", "note")


@dataclass(frozen=True)
class StageProgress:
    """What a stage trains, and how far it is.

    Attributes
    ----------
    network : str
        Which network, and in brackets which part of a study.
    epoch, epochs : int
        Done, and to be done; 0 if it trains nothing.
    remaining : float or None
        Seconds of training that are left, at its steady pace; None where that is not known, as in the first two epochs.
    """

    network: str
    epoch: int
    epochs: int
    remaining: float | None


@dataclass(frozen=True)
class StageState:
    """One stage of a store.

    Attributes
    ----------
    disk : int
        Bytes in its folder.
    note : str
        Why it failed, or which process works on it.
    referenced : bool
        Whether a run whose folder is still there uses it.
    """

    folder: Path
    state: State
    disk: int
    note: str
    referenced: bool

    @cached_property
    def progress(self) -> StageProgress:
        """What it trains, and how far it is: read when it is asked for, since it takes as long as all the rest."""
        config, rows = Stage(self.folder).config(), read_metrics(self.folder)
        epochs = int(((config.get("key") or {}).get("training") or {}).get("epochs", 0))
        pace = steady_pace(rows) if self.state == "running" and epochs else None
        return StageProgress(
            network=f"{(config.get('network') or {}).get('name', '')} ({config['title']})" if "title" in config else "",
            epoch=len(rows),
            epochs=epochs,
            remaining=None if pace is None else pace * (epochs - len(rows)),
        )

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
    with os.scandir(folder) as entries:
        for entry in entries:
            # Stages that are being removed have a name with a dot.
            if entry.is_dir() and not entry.name.startswith("."):
                # Another process may remove the stage at this moment.
                with suppress(FileNotFoundError):
                    found.append(_read_stage(folder / entry.name, entry.name in used))
    return sorted(found, key=lambda stage: (STATES.index(stage.state), stage.folder.name))


def stages_table(root: Path, stages: Sequence[StageState], *, most: int | None = None) -> str:
    """Return `stages` as a Markdown table, and a line with the sums and the size of the store's cache.

    Parameters
    ----------
    root : Path
        The store.
    stages : sequence of StageState
    most : int, optional
        Rows of the table: the other stages are only counted, which the text says.
    """
    rows = [
        [
            stage.state,
            stage.folder.name,
            stage.progress.network,
            f"{stage.progress.epoch}/{stage.progress.epochs}" if stage.progress.epochs else "",
            "" if stage.progress.remaining is None else duration(stage.progress.remaining),
            size(stage.disk),
            stage.note + ("" if stage.referenced or stage.state != "done" else "used by no run"),
        ]
        for stage in stages[:most]
    ]
    counts = ", ".join(f"{n:,} {s}" for s in STATES if (n := sum(stage.state == s for stage in stages)))
    unused = sum(stage.state == "done" and not stage.referenced for stage in stages)
    total = f"{counts or 'no stages'}{f' ({unused:,} used by no run)' if unused else ''}; "
    total += (
        f"{size(sum(stage.disk for stage in stages))} in stages, {size(_folder_bytes(root / 'cache'))} in the cache"
    )
    more = [f"and {len(stages) - len(rows):,} more stages, which --all lists"] if len(rows) < len(stages) else []
    return "\n\n".join([*([markdown(COLUMNS, rows)] if rows else []), *more, total])


def _read_stage(folder: Path, referenced: bool) -> StageState:
    status = read_status(f"{folder}/status.json")
    state: State = status["state"] if status.get("state") in STATES else "unfinished"
    if state == "running":
        silence = time.time() - (folder / "status.json").stat().st_mtime
        state = "stale" if silence > STALE_SECONDS or _process_is_gone(status) else "running"
    process = f"process {status.get('pid')} on {status.get('host')}"
    notes = {"failed": str(status.get("reason", "")), "running": f"{process} works on it", "stale": f"{process} died"}
    return StageState(folder, state, _folder_bytes(str(folder)), notes.get(state, ""), referenced)


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


def _folder_bytes(folder: Path | str) -> int:
    total = 0
    # A file or a folder may go while it is read: a checkpoint, say.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                is_folder = entry.is_dir(follow_symlinks=False)
                total += _folder_bytes(entry.path) if is_folder else entry.stat().st_size
    return total
