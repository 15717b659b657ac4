"""One stage: a folder with a status, its result, and the files that the result rests on.

A stage is begun, then finished, failed or stopped, by the one process that holds it. What is finished is used as long
as its files have the checksums recorded in ``status.json``; everything else is done again.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rethink_prune.errors import UserError
from rethink_prune.files import file_digest, write_atomically
from rethink_prune.store.ownership import OwnedFolder

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
# Logits by which whoever loads the network sees that it computes what it did.
SAMPLE_FILE = "sample.safetensors"
# Ten times as fast where PyYAML was built with libyaml, as its wheels are.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Started:
    """What a stage started from: the name of its parent, for messages, and the digest of the parent's weights."""

    name: str
    digest: str


class Stage(OwnedFolder):
    """One unit of work, whose result is kept in the folder ``<kind>-<key>``.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     stage = Stage(Path(folder) / "large-0123")
    ...     with stage.hold():
    ...         stage.begin({"title": "large"}, started=None)
    ...         size = stage.model_file.write_bytes(b"weights")
    ...         stage.finish({"top1": 93.5})
    ...     stage.result()
    {'top1': 93.5}
    """

    @property
    def model_file(self) -> Path:
        """The file with the stage's weights."""
        return self.folder / MODEL_FILE

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of a finished stage."""
        return self.status()["digests"][MODEL_FILE]

    def config(self) -> dict[str, Any]:
        """Return what the stage says about itself in ``config.yaml``, or an empty mapping if that is damaged."""
        try:
            content = yaml.load((self.folder / "config.yaml").read_text(), Loader=_LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return content if isinstance(content, dict) else {}

    def result(self, started: Started | None = None) -> dict[str, Any] | None:
        """Return the result of a finished, intact stage, else None: then it can be done again.

        Raises
        ------
        UserError
            If the stage started from other weights than `started`.
        """
        status = self.status()
        self._check_start(status, started)
        if status.get("state") != "done":
            return None
        damaged = self._first_damaged_file(status["digests"])
        if damaged is not None:
            log.warning("%s is damaged (its checksum does not match): the stage is done again", damaged)
            return None
        return status["result"]

    def finished(self) -> dict[str, Any]:
        """Return the result, for callers that only read the stage and cannot do it again.

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
            damaged, result = self._first_damaged_file(status["digests"]), dict(status["result"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._status_file}: is damaged") from None
        if damaged is not None:
            raise UserError(f"{damaged}: is damaged (its checksum does not match)")
        return result

    def begin(self, config: Mapping[str, Any], started: Started | None) -> None:
        """Mark the held stage as running. Checkpoints of an earlier attempt stay: the work goes on from them.

        Parameters
        ----------
        config : mapping
            What ``config.yaml`` says about the stage: ``network``, ``images``, ``key`` and ``title``.
        started : Started, optional
            Its parent, if it starts from one's weights.

        Raises
        ------
        UserError
            If an earlier attempt started from other weights.
        """
        self.check_owner()
        self._check_start(self.status(), started)
        # A process that was killed while it wrote a file leaves the temporary file behind.
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        process = {"host": socket.gethostname(), "pid": os.getpid(), "owner": self.owner}
        parent = started.digest if started else None
        self._update_status({"state": "running", **process, "started_from": parent}, keep=False)

    def finish(self, result: Mapping[str, Any], files: Sequence[str] = (MODEL_FILE,)) -> None:
        """Mark the stage as done, with its result and the checksums of `files`, names in its folder."""
        self.check_owner()
        digests = {name: file_digest(self.folder / name) for name in files}
        self._update_status({"state": "done", "digests": digests, "result": dict(result)})

    def fail(self, reason: str, **details: Any) -> None:
        """Mark the stage as failed; it is tried again when it is asked for again."""
        self.check_owner()
        self._update_status({"state": "failed", "reason": reason, **details})

    def stop(self) -> None:
        """Mark the stage as stopped on request; it goes on when it is asked for again."""
        # No error if the stage is lost: the process ends anyway, and must leave the new owner's status alone.
        if self._is_owner():
            self._update_status({"state": "stopped"})

    def _first_damaged_file(self, digests: Mapping[str, str]) -> Path | None:
        paths = {self.folder / name: digest for name, digest in digests.items()}
        return next((p for p, digest in paths.items() if not p.is_file() or file_digest(p) != digest), None)

    def _check_start(self, status: Mapping[str, Any], started: Started | None) -> None:
        recorded = status.get("started_from")
        if started is not None and recorded is not None and recorded != started.digest:
            raise UserError(
                f"{self.folder} started from other weights than {started.name} holds now "
                f"(recorded {recorded[:12]}, found {started.digest[:12]}); remove that folder to do the stage again"
            )


@dataclass(frozen=True)
class Done:
    """A finished stage, what it recorded, and the stages whose weights it needed."""

    stage: Stage
    result: dict[str, Any]
    parents: tuple["Done", ...] = ()

    @property
    def flops_total(self) -> int | None:
        """Training FLOPs of the stage and its ancestors; None if some of them are not known.

        Examples
        --------
        >>> from pathlib import Path
        >>> large = Done(Stage(Path("large-0123")), {"train_flops": 20})
        >>> prune = Done(Stage(Path("prune-0123")), {"train_flops": 0}, (large,))
        >>> Done(Stage(Path("finetune-0123")), {"train_flops": 5}, (prune, large)).flops_total
        25
        """
        return total_flops([self])

    @property
    def started(self) -> Started:
        """What a stage that starts from these weights records."""
        return Started(self.stage.name, self.stage.digest)


def total_flops(stages: Iterable[Done]) -> int | None:
    """Return the training FLOPs of stages and their ancestors, each counted once; None if some are not known.

    Examples
    --------
    >>> total_flops([])
    0
    """
    found: dict[str, int | None] = {}
    parts: dict[str, str] = {}
    waiting = [*stages]
    while waiting:
        done = waiting.pop()
        found[done.stage.name] = done.result["train_flops"]
        if "part_of" in done.result:
            parts[done.stage.name] = done.result["part_of"]
        waiting += done.parents
    # The start of a training that is there as well is paid for with it.
    found = {name: flops for name, flops in found.items() if parts.get(name) not in found}
    known = [flops for flops in found.values() if flops is not None]
    return sum(known) if len(known) == len(found) else None


def start_of(parents: Sequence[Done]) -> Started | None:
    """Return what a stage records that needs the weights of these; None for none."""
    starts = [parent.started for parent in parents]
    if len(starts) < 2:
        return starts[0] if starts else None
    digests = "".join(start.digest for start in starts)
    return Started(" and ".join(start.name for start in starts), hashlib.sha256(digests.encode()).hexdigest())


@dataclass(frozen=True)
class Failed:
    """A stage without a result: the reason, and the epoch in which its training diverged."""

    reason: str
    epoch: int | None = None
