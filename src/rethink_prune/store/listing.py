"""What is in a store: every stage's state, progress and size, and which stages nobody needs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from rethink_prune.errors import UserError
from rethink_prune.store.metrics import read_metrics
from rethink_prune.store.stages import STALE_SECONDS, Stage, Store
from rethink_prune.text import duration, markdown, size

State = Literal["done", "running", "stale", "stopped", "failed", "unfinished"]
# In the order of the table: what wants attention first.
STATES: tuple[State, ...] = ("running", "stale", "failed", "stopped", "unfinished", "done")
COLUMNS = ("state", "stage", "network", "epoch", "remaining", "disk", "note")
_REMOVED = ".removed-"  # begins the name of a stage on its way out


@dataclass(frozen=True)
class StageState:
    """One stage of a store.

    Attributes
    ----------
    folder : Path
    state : State
        ``stale`` is one whose process died; ``unfinished`` one without a readable status.
    title, network : str
        Which part of a study it is, and of which network.
    epoch, epochs : int
        Done, and to be done; 0 if it trains nothing.
    remaining : float or None
        Seconds of training that are left, at the pace so far; None where that is not known.
    disk : int
        Bytes in its folder.
    note : str
        Why it failed, or who works on it.
    referenced : bool
        Whether a run whose folder is still there uses it.
    """

    folder: Path
    state: State
    title: str
    network: str
    epoch: int
    epochs: int
    remaining: float | None
    disk: int
    note: str
    referenced: bool

    @property
    def needless(self) -> bool:
        """Whether it can go without costing more than the time to do it again: unfinished, or used by no run."""
        return self.state not in ("running", "done") or (self.state == "done" and not self.referenced)


def list_stages(root: Path) -> list[StageState]:
    """Return the stages of a store, those that want attention first.

    Raises
    ------
    UserError
        If `root` is no store, or a later version's.
    """
    Store(root).check()
    folder = root / "stages"
    if not folder.is_dir():
        raise UserError(f"{root}: is no store: it has no folder stages")
    used = _referenced(root)
    found = []
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith(_REMOVED):
            with suppress(FileNotFoundError):  # removed since it was listed
                found.append(_look(path, path.name in used))
    return sorted(found, key=lambda stage: (STATES.index(stage.state), stage.folder.name))


def stages_table(root: Path, stages: Sequence[StageState]) -> str:
    """Return the stages as a table, and a line with the sums."""
    rows = [
        [
            stage.state,
            stage.folder.name,
            f"{stage.network} ({stage.title})" if stage.title else "",
            f"{stage.epoch}/{stage.epochs}" if stage.epochs else "",
            "" if stage.remaining is None else duration(stage.remaining),
            size(stage.disk),
            stage.note + ("" if stage.referenced or stage.state != "done" else "used by no run"),
        ]
        for stage in stages
    ]
    counts = ", ".join(f"{n} {s}" for s in STATES if (n := sum(stage.state == s for stage in stages)))
    cache = size(_disk(root / "cache"))
    total = f"{counts or 'no stages'}; {size(sum(stage.disk for stage in stages))} in stages, {cache} in the cache"
    return f"{markdown(COLUMNS, rows)}\n\n{total}" if rows else total


def remove_stages(stages: Sequence[StageState]) -> list[StageState]:
    """Remove stages from their store, but for those that a process works on by now; return what is gone."""
    gone = []
    for stage in stages:
        try:
            # Held until the lock file is gone, too: whoever waits for it then sees that, and makes a new one.
            with FileLock(stage.folder / "lock", blocking=False):
                # Out of the way at once: from here on, whoever asks for the stage makes a new one.
                doomed = stage.folder.with_name(f"{_REMOVED}{stage.folder.name}-{uuid.uuid4().hex[:8]}")
                stage.folder.rename(doomed)
                shutil.rmtree(doomed)
        except Timeout:
            continue
        gone.append(stage)
    return gone


def remove_remains(root: Path) -> None:
    """Remove what earlier removals left behind because they were stopped halfway."""
    for doomed in (root / "stages").glob(f"{_REMOVED}*"):
        shutil.rmtree(doomed, ignore_errors=True)  # another process may be at it


def _look(folder: Path, referenced: bool) -> StageState:
    status = Stage(folder).status()
    config = _config(folder)
    key = config.get("key") or {}
    epochs = int((key.get("training") or {}).get("epochs", 0))
    rows = read_metrics(folder)
    state = _state(folder, status)
    remaining = None
    if state == "running" and rows and epochs:
        remaining = rows[-1]["seconds"] / len(rows) * (epochs - len(rows))
    return StageState(
        folder=folder,
        state=state,
        title=str(config.get("title", "")),
        network=str((config.get("network") or {}).get("name", "")),
        epoch=len(rows),
        epochs=epochs,
        remaining=remaining,
        disk=_disk(folder),
        note=_note(state, status),
        referenced=referenced,
    )


def _state(folder: Path, status: Mapping[str, Any]) -> State:
    state = status.get("state")
    if state == "running":
        silence = time.time() - (folder / "status.json").stat().st_mtime
        return "stale" if silence > STALE_SECONDS or _died(status) else "running"
    return state if state in STATES else "unfinished"


def _died(status: Mapping[str, Any]) -> bool:
    """Tell whether the process that worked on a stage is gone, as far as this machine can know."""
    if status.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(status["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is somebody else's, and alive
        return False
    return False


def _note(state: State, status: Mapping[str, Any]) -> str:
    match state:
        case "failed":
            return str(status.get("reason", ""))
        case "running" | "stale":
            verb = "works on it" if state == "running" else "died"
            return f"process {status.get('pid')} on {status.get('host')} {verb}"
    return ""


def _referenced(root: Path) -> set[str]:
    """Return the names of the stages that runs use whose folders are still there."""
    used: set[str] = set()
    for record in (root / "runs").glob("*.json"):
        try:
            content = json.loads(record.read_text())
            if Path(content["run_dir"]).is_dir():
                used.update(content["stages"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # being written, or damaged: it speaks for no stage
    return used


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except OSError:  # removed since it was listed
            continue
    return total
