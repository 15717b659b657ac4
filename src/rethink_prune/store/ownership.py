"""A folder that one process works on at a time, by a file lock, a heartbeat and a take-over.

The operating system drops the lock of a process that dies, so the folder is free at once. Where that fails, the
heartbeat in ``status.json`` stops, and after `STALE_SECONDS` a waiting process takes the folder over.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rethink_prune.errors import UserError
from rethink_prune.files import write_json
from rethink_prune.turns import turn_given_away

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
HEARTBEAT_SECONDS = 5.0
# Many heartbeats: a slow disk or a busy machine delays some of them.
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5


def read_status(file: Path | str) -> dict[str, Any]:
    """Return the content of a ``status.json``; an empty mapping if there is none or it is damaged.

    Examples
    --------
    >>> read_status("no/such/status.json")
    {}
    """
    try:
        with open(file, "rb") as content:  # noqa: PTH123 (a store has many: making a path for each takes as long)
            return json.loads(content.read())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        log.warning("%s is damaged: the stage is done again", file)
        return {}


class OwnedFolder:
    """The folder `folder`, which need not exist yet, and the ``status.json`` in it.

    Attributes
    ----------
    folder : Path
    owner : str
        Names this process and object; ``status.json`` names the present owner.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = uuid.uuid4().hex
        self._status_file = folder / "status.json"
        # Two threads of the owner write the status: the one that does the work, and the heartbeat.
        self._writing = threading.Lock()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    def status(self) -> dict[str, Any]:
        """Return the content of ``status.json``; an empty mapping if there is none or it is damaged."""
        return read_status(self._status_file)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Own the folder while the body runs; waits as long as another living process owns it.

        Raises
        ------
        UserError
            If the folder cannot be made or locked.
        """
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
            # Before the lock is free: a late heartbeat would overwrite what the next owner writes.
            beat.join()
            lock.release()

    def check_owner(self) -> None:
        """Raise `UserError` if another process has taken the folder over because this one seemed dead."""
        if not self._is_owner():
            raise UserError(
                f"{self.folder}: taken over by another process while this one did not respond for "
                f"{STALE_SECONDS:.0f} s; run the same command again to wait for its result"
            )

    def _is_owner(self) -> bool:
        return self.status().get("owner", self.owner) == self.owner

    def _update_status(self, changes: Mapping[str, Any], *, keep: bool = True) -> None:
        """Change entries of ``status.json`` and its heartbeat; `keep` tells whether the other entries stay."""
        with self._writing:
            status = self.status() if keep else {}
            write_json(self._status_file, {**status, **changes, "heartbeat": time.time()})

    def _acquire(self) -> FileLock:
        lock = FileLock(self.folder / LOCK_FILE)
        heartbeat, since = None, None
        while True:
            try:
                lock.acquire(blocking=False)
                self._update_status({"owner": self.owner})
                return lock
            except Timeout:
                status, now = self.status(), time.monotonic()
            except OSError as error:
                raise UserError(
                    f"{lock.lock_file}: cannot be locked ({error.strerror}); name a folder on a file system that has "
                    "file locks with store.root=..."
                ) from error
            if since is None:
                who = f"process {status.get('pid', '?')} on {status.get('host', '?')}"
                log.info("waiting for %s: %s works on it", self.name, who)
            # A heartbeat is compared only with an earlier one: the clocks of machines that share a store differ.
            if since is None or status.get("heartbeat") != heartbeat:
                heartbeat, since = status.get("heartbeat"), now
            elif now - since >= STALE_SECONDS:
                self._take_over(heartbeat)
            with turn_given_away():
                time.sleep(POLL_SECONDS)

    def _take_over(self, heartbeat: float | None) -> None:
        # A killed process's lock can live on in its children, and on some network file systems. Removing the lock file
        # is enough: the next attempt makes a new file and locks that one. Of two waiting processes, one has the second
        # lock first; the other one then sees a new heartbeat, and leaves the new lock file alone.
        with FileLock(self.folder / f"{LOCK_FILE}.break"):
            if self.status().get("heartbeat") == heartbeat:
                log.warning("%s: no heartbeat for %.0f s: taking it over", self.name, STALE_SECONDS)
                (self.folder / LOCK_FILE).unlink(missing_ok=True)
                self._update_status({"owner": self.owner})

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            # The disk may be full for a moment. If it stays full, the work itself ends with that error.
            with suppress(UserError):
                if self._is_owner():
                    self._update_status({})
