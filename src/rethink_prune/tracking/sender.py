"""Send trainings to trackers without being able to harm a study.

Each tracker is used in a process of its own, by :func:`serve`. A thread of the study tells it what is new, and waits
for its answers: whatever a tracker does, raise, hang, or end the process, the training goes on. What the tracker has
not taken yet is kept once for each training, as all rows so far, so nothing piles up behind a slow one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from rethink_prune.errors import first_line
from rethink_prune.files import write_json
from rethink_prune.imports import find_named
from rethink_prune.tracking.trackers import KNOWN, OpenRun, State, TrackedRun, Tracker, plain_metrics
from rethink_prune.turns import turn_given_away

log = logging.getLogger(__name__)

# How long the end of a study waits for its trackers, and how long they have after the end of its process.
PATIENCE_SECONDS = 30.0
STOPPED_PATIENCE_SECONDS = 5.0
_ORPHAN_SECONDS = 60
# Another process that sends the same run is about to finish it.
_LOCK_SECONDS = 20.0

# The trackers' own variables decide; these are for those that are not set. Nothing is to ask, print or call home.
_QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Trackers:
    """The trackers of a study, as a context.

    Parameters
    ----------
    names : sequence of str
        Of :data:`~rethink_prune.tracking.trackers.KNOWN`, or ``path.to.module:Class``. One whose package is not
        installed is left out, with a warning.
    folder : Path
        Gets what they keep on this machine, and which runs are complete; made when something is sent.
    study : mapping
        The part ``study`` of the summary.
    patient : bool
        Whether the end waits until all is sent, instead of `PATIENCE_SECONDS` at most.
    runs : Path or None
        The study's run folder, for messages.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        study: Mapping[str, Any] | None = None,
        patient: bool = False,
        runs: Path | None = None,
    ) -> None:
        self.study = study or {}
        self._patient = patient
        there = [name for name in names if name not in missing_trackers(names)]
        for name in missing_trackers(names):
            install = f'pip install "rethink-prune[{name}]"'
            log.warning("tracker=%s: is not installed, nothing is sent to it; %s", name, install)
        self.senders = {name: Sender(name, folder, runs) for name in there}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # After a signal, a batch system may kill the study within seconds.
        seconds = STOPPED_PATIENCE_SECONDS if isinstance(error, KeyboardInterrupt) else PATIENCE_SECONDS
        end = time.monotonic() + seconds
        for sender in self.senders.values():
            sender.finish()
        for sender in self.senders.values():
            sender.wait(None if self._patient else max(0.0, end - time.monotonic()))

    def send(self, run: TrackedRun, rows: Sequence[Mapping[str, float]], state: State = "running") -> None:
        """Have a run sent: all its rows so far. Returns at once."""
        for sender in self.senders.values():
            sender.send(run, list(rows), state)


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Return those of `names` whose package is not installed.

    Examples
    --------
    >>> missing_trackers(["my_module:MyTracker"])
    []
    """
    found = []
    for name in names:
        try:
            if name in KNOWN:
                version(name)
        except PackageNotFoundError:
            found.append(name)
    return found


class Sender:
    """The thread that feeds one tracker's process.

    Attributes
    ----------
    sent : dict
        How many epochs were new, by run.
    problem : str or None
        Why nothing more is sent.
    """

    def __init__(self, name: str, folder: Path, runs: Path | None = None) -> None:
        self.name = name
        self.sent: dict[str, int] = {}
        self.problem: str | None = None
        self._folder = folder
        self._runs = runs
        self._updates: dict[str, tuple[TrackedRun, list[Mapping[str, float]], State]] = {}
        self._changed = threading.Condition()
        self._finished = False
        self._ended = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        # With this thread's context: the log of a sweep sorts lines by it. A daemon: the study's end waits for nothing.
        threading.Thread(target=copy_context().run, args=(self._work,), daemon=True, name=f"tracker {name}").start()

    def send(self, run: TrackedRun, rows: list[Mapping[str, float]], state: State) -> None:
        """Take what is to be sent."""
        with self._changed:
            if self.problem is None:
                self._updates[run.id] = (run, rows, state)
                self._changed.notify()

    def finish(self) -> None:
        """Let the thread end when everything is sent."""
        with self._changed:
            self._finished = True
            self._changed.notify()

    def wait(self, patience: float | None) -> None:
        """Wait for the end, at most so many seconds; what is not sent by then is said, and left."""
        try:
            # Other studies of this process may train meanwhile.
            with turn_given_away():
                self._ended.wait(patience)
        finally:
            if not self._ended.is_set():
                self._give_up("did not take everything in time")
                if self._process is not None:
                    self._process.kill()

    def _work(self) -> None:
        try:
            while (update := self._next()) is not None:
                run, rows, state = update
                answer = self._ask({"run": asdict(run), "rows": rows, "state": state})
                if "error" in answer:
                    self._give_up(answer["error"])
                    break
                self.sent[run.id] = self.sent.get(run.id, 0) + answer["sent"]
            if self._process is not None and self._process.stdin is not None:
                # It closes what is open, and ends.
                self._process.stdin.close()
                self._process.wait()
        except Exception as error:
            self._give_up(first_line(error))
        finally:
            self._ended.set()

    def _next(self) -> tuple[TrackedRun, list[Mapping[str, float]], State] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._updates or self._finished)
            return self._updates.pop(next(iter(self._updates))) if self._updates else None

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = _start(self.name, self._folder)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "its process ended"}

    def _give_up(self, why: str) -> None:
        """Send nothing more, and say so, once."""
        with self._changed:
            if self.problem is not None:
                return
            self.problem = why
            self._updates.clear()
        command = f"python -m rethink_prune.report --push --tracker {self.name} {self._runs or 'RUN_OR_STORE'}"
        said = f"{why} (see {self._folder / _log_name(self.name)})"
        log.warning("tracker=%s: %s; nothing more is sent to it. To send it later: %s", self.name, said, command)


def _log_name(name: str) -> str:
    return f"{name.replace(':', '-')}.log"


def _start(name: str, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    # With the modules that this process finds, from wherever it has them.
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with (folder / _log_name(name)).open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**_QUIET, **os.environ, "PYTHONPATH": path},
            # Ctrl-C is for the study, which ends this process when it has saved.
            start_new_session=True,
        )


def serve(name: str, folder: Path) -> None:
    """Be the process of a tracker: a JSON object a line comes in, and is answered by one."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What the package prints goes to the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    desk: _Desk | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            desk = desk or _Desk(name, folder)
            answer: dict[str, Any] = {
                "sent": desk.take(TrackedRun(**message["run"]), message["rows"], message["state"])
            }
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)
    # The study has ended, or was killed. A server that does not answer must not keep this process.
    signal.alarm(_ORPHAN_SECONDS)
    if desk is not None:
        desk.close()


class _Desk:
    """Takes what is new of runs, in the process of a tracker."""

    def __init__(self, name: str, folder: Path) -> None:
        made: Any = find_named(name, KNOWN, "tracker", what="tracker", form="Class")
        self._tracker: Tracker = made(folder)
        place = hashlib.sha256(self._tracker.destination.encode()).hexdigest()[:8]
        # Which runs are complete there: they are not opened again.
        self._complete = folder / "complete" / f"{name.replace(':', '-')}-{place}"
        self._complete.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, tuple[OpenRun, FileLock]] = {}

    def take(self, run: TrackedRun, rows: Sequence[Mapping[str, float]], state: State) -> int:
        """Send the rows that are new; return how many they were."""
        marker = self._complete / f"{run.id}.json"
        if run.id not in self._open:
            # One process at a time: a training that ends is often reused at once by several studies of a sweep.
            lock = FileLock(self._complete / f"{run.id}.lock")
            try:
                # While the training goes on, it is asked for again.
                lock.acquire(timeout=0 if state == "running" else _LOCK_SECONDS)
            except Timeout:
                print(f"{run.id}: another process sends it")
                return 0
            if marker.is_file():
                lock.release()
                return 0
            self._open[run.id] = (self._tracker.open(run), lock)
        opened, lock = self._open[run.id]
        before, flops = opened.epochs, run.flops_before
        for row in rows:
            if flops is not None and run.flops_per_image is not None:
                flops += run.flops_per_image * row["images"]
            if row["epoch"] > opened.epochs:
                opened.log(plain_metrics(row, flops), int(row["epoch"]))
                opened.epochs = int(row["epoch"])
        if state != "running":
            opened.close(state)
            if state == "finished":
                write_json(marker, {"destination": self._tracker.destination, "epochs": opened.epochs})
            del self._open[run.id]
            lock.release()
        return max(0, opened.epochs - before)

    def close(self) -> None:
        """End what is not complete."""
        for opened, _ in self._open.values():
            opened.close("stopped")


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
