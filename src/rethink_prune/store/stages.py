"""The store: a folder of finished and unfinished stages, shared by every run of a sweep.

``STORE/stages/<kind>-<key>/`` holds one stage. The key is a hash of exactly what decides the stage's result, so a
stage that is there is never computed twice. One process works on a stage at a time (an OS-level lock, which the
system drops when the process dies); ``status.json`` says who and since when. ``STORE/format.json`` says which versions
of the software can use the store.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from rethink_prune.errors import UserError
from rethink_prune.files import file_digest, write_atomically, write_json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Counts up when an earlier version of the software would misread what keys, files or checkpoints mean.
FORMAT = 1
FORMAT_FILE = "format.json"
MODEL_FILE = "model.safetensors"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5


class Store:
    """The folder `root`; made if it is not there.

    Raises
    ------
    UserError
        If the folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def check(self) -> None:
        """See, without writing, that nothing else is in the store's place, and that this version can use it."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"store.root={self.root}: cannot be written (it is a file); name a folder instead")
        file = self.root / FORMAT_FILE
        try:
            found = int(json.loads(file.read_text())["format"])
        except FileNotFoundError:  # not made yet, or by the first versions, which did not write it
            return
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{file}: is damaged; a store of this version has {{"format": {FORMAT}}} there') from None
        if found > FORMAT:
            raise UserError(
                f"store.root={self.root}: has format {found}, from a later version of rethink-prune; this one reads "
                f"formats up to {FORMAT}: update it, or name another folder"
            )

    def prepare(self) -> None:
        """Make the folders of the store and see that they can be written."""
        self.check()
        try:
            if not (self.root / "stages").is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                write_json(self.root / FORMAT_FILE, {"format": FORMAT})
            for folder in (self.root / "stages", self.root / "runs", self.cache):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.root / "runs" / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"store.root={self.root}: cannot be written ({error.strerror}); "
                "name a folder you can write with store.root=..."
            ) from error

    @property
    def cache(self) -> Path:
        """Folder for what can be made again at any time: decoded images."""
        return self.root / "cache"

    def stage(self, name: str) -> Stage:
        """Return the stage of this name, ``<kind>-<key>``, whether it exists or not."""
        return Stage(self.root / "stages" / name)

    def record_run(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Note which run folder uses which stages."""
        write_json(self.root / "runs" / f"{run_id}.json", record)


@dataclass(frozen=True)
class Started:
    """What a stage started from: the digest of its parent's weights, and a name for messages."""

    name: str
    digest: str


class Stage:
    """One cacheable unit of work: a folder with a status."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owner = uuid.uuid4().hex
        self._status_lock = threading.Lock()

    @property
    def name(self) -> str:
        """The folder's name, ``<kind>-<key>``."""
        return self.folder.name

    @property
    def _status_file(self) -> Path:
        return self.folder / "status.json"

    @property
    def model_file(self) -> Path:
        """The file with the stage's weights."""
        return self.folder / MODEL_FILE

    def status(self) -> dict[str, Any]:
        """Return the content of ``status.json``, or an empty mapping if there is none or it is damaged."""
        try:
            return json.loads((self._status_file).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError:
            log.warning("%s is damaged: the stage is done again", self._status_file)
            return {}

    def result(self, started: Started | None = None) -> dict[str, Any] | None:
        """Return the result of a finished, intact stage, else None.

        Raises
        ------
        UserError
            If the stage started from other weights than `started`.
        """
        status = self.status()
        self._check_start(status, started)
        if status.get("state") != "done":
            return None
        damaged = self._damaged(status["digests"])
        if damaged is not None:
            log.warning("%s is damaged (its checksum does not match): the stage is done again", damaged)
            return None
        return status["result"]

    def finished(self) -> dict[str, Any]:
        """Return the result, for those who only read the stage and could not do it again.

        Raises
        ------
        UserError
            If the folder holds no stage, or one that is not finished or damaged.
        """
        if not self._status_file.is_file():
            raise UserError(f"{self.folder}: is no stage: there is no {self._status_file.name} in it")
        try:
            status = json.loads(self._status_file.read_text())
            if status["state"] != "done":
                raise UserError(f"{self.folder}: not a finished stage (state: {status['state']})")
            damaged, result = self._damaged(status["digests"]), dict(status["result"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._status_file}: is damaged") from None
        if damaged is not None:
            raise UserError(f"{damaged}: is damaged (its checksum does not match)")
        return result

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of a finished stage."""
        return self.status()["digests"][MODEL_FILE]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one process that works on this stage; waits while another one does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror})") from error
        lock = self._acquire()
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True, name=f"heartbeat {self.name}")
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            lock.release()

    def begin(self, config: Mapping[str, Any], started: Started | None) -> None:
        """Mark the held stage as running; what an earlier attempt left behind stays for the work to go on from.

        Raises
        ------
        UserError
            If an earlier attempt started from other weights.
        """
        self.check_owner()
        self._check_start(self.status(), started)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        self._write_status(
            {
                "state": "running",
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "owner": self._owner,
                "started_from": started.digest if started else None,
            },
            keep=False,
        )

    def finish(self, result: Mapping[str, Any], files: Sequence[str] = (MODEL_FILE,)) -> None:
        """Mark the stage as done; `files` are checked against their present content whenever it is used."""
        self.check_owner()
        digests = {name: file_digest(self.folder / name) for name in files}
        self._write_status({"state": "done", "digests": digests, "result": dict(result)})

    def fail(self, reason: str, **details: Any) -> None:
        """Mark the stage as failed; it is tried again when it is asked for again."""
        self.check_owner()
        self._write_status({"state": "failed", "reason": reason, **details})

    def stop(self) -> None:
        """Mark the stage as stopped on request; it goes on when it is asked for again."""
        if self._is_owner():
            self._write_status({"state": "stopped"})

    def check_owner(self) -> None:
        """Raise if another process has taken the stage over because this one seemed dead."""
        if not self._is_owner():
            raise UserError(
                f"{self.folder}: taken over by another process while this one did not respond for "
                f"{STALE_SECONDS:.0f} s; run the same command again to wait for its result"
            )

    def _is_owner(self) -> bool:
        return self.status().get("owner", self._owner) == self._owner

    def _damaged(self, digests: Mapping[str, str]) -> Path | None:
        """Return the first file whose content is not what it was when the stage was finished."""
        paths = {self.folder / name: digest for name, digest in digests.items()}
        return next((p for p, digest in paths.items() if not p.is_file() or file_digest(p) != digest), None)

    def _check_start(self, status: Mapping[str, Any], started: Started | None) -> None:
        recorded = status.get("started_from")
        if started is not None and recorded is not None and recorded != started.digest:
            raise UserError(
                f"{self.folder} started from other weights than {started.name} holds now "
                f"(recorded {recorded[:12]}, found {started.digest[:12]}); remove that folder to do the stage again"
            )

    def _write_status(self, changes: Mapping[str, Any], *, keep: bool = True) -> None:
        with self._status_lock:
            status = self.status() if keep else {}
            write_json(self._status_file, {**status, **changes, "heartbeat": time.time()})

    def _acquire(self) -> FileLock:
        path = self.folder / "lock"
        seen, since, waiting = self._last_sign(), time.monotonic(), False
        while True:
            lock = FileLock(path)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                pass
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be locked ({error.strerror}); name a folder on a file system that has file locks "
                    "with store.root=..."
                ) from error
            else:
                self._write_status({"owner": self._owner})
                return lock
            if not waiting:
                status = self.status()
                who = f"process {status.get('pid', '?')} on {status.get('host', '?')}"
                log.info("waiting for %s: %s works on it", self.name, who)
                waiting = True
            sign = self._last_sign()
            if sign != seen:
                seen, since = sign, time.monotonic()
            elif time.monotonic() - since >= STALE_SECONDS:
                self._take_over(path, seen)
            time.sleep(POLL_SECONDS)

    def _take_over(self, path: Path, seen: int | None) -> None:
        # A killed process's lock can live on in its children, and on some network file systems; its heartbeat stops.
        # Unlinking the lock file frees the name; the guard keeps two waiters from both doing it.
        with FileLock(self.folder / "lock.break"):
            if self._last_sign() == seen:
                log.warning("%s: no heartbeat for %.0f s: taking it over", self.name, STALE_SECONDS)
                path.unlink(missing_ok=True)
                self._write_status({"owner": self._owner})

    def _last_sign(self) -> int | None:
        """When the status was last written, which a living owner does all the time.

        Only compared with itself: the clocks of machines that share a store differ.
        """
        try:
            return self._status_file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with self._status_lock:
                status = self.status()
                if status.get("owner") == self._owner:
                    with suppress(UserError):  # a disk that is full for a moment; the work itself says so if it stays
                        write_json(self._status_file, {**status, "heartbeat": time.time()})


@dataclass(frozen=True)
class Done:
    """A finished stage: where it is, what it recorded, and the training FLOPs of its ancestors (None: not known)."""

    stage: Stage
    result: dict[str, Any]
    flops_before: int | None = 0

    @property
    def flops_total(self) -> int | None:
        """Training FLOPs of the stage and its ancestors."""
        own = self.result["train_flops"]
        return None if own is None or self.flops_before is None else own + self.flops_before

    @property
    def started(self) -> Started:
        """What a stage that starts from these weights records."""
        return Started(self.stage.name, self.stage.digest)


@dataclass(frozen=True)
class Failed:
    """A stage without a result, and why."""

    reason: str
    epoch: int | None = None


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, atomically; tensors that share storage are written once per name."""
    from safetensors.torch import save

    write_atomically(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}))


def load_stage_weights(stage: Stage) -> dict[str, Tensor]:
    """Return the state dict of a finished stage."""
    from safetensors.torch import load_file

    return load_file(stage.model_file)
