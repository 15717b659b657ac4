"""The store: the folder of all stages, shared by every run of a sweep.

``STORE/stages/<kind>-<key>/`` holds one stage. The key is a hash of exactly what decides the stage's result, so a
stage that is there is never computed twice. ``STORE/runs/<id>.json`` says which run folder uses which stages,
``STORE/format.json`` which versions of the software can use the store.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout

from rethink_prune.errors import UserError
from rethink_prune.files import write_json
from rethink_prune.store.filesystem import check_file_system
from rethink_prune.store.ownership import LOCK_FILE
from rethink_prune.store.stage import Stage

# Counts up when an earlier version of the software would misread what keys, files or checkpoints mean.
FORMAT = 1
FORMAT_FILE = "format.json"
# Begins the name of a stage that is being removed; a name with a dot is not listed.
_PREFIX = ".removed-"


class Store:
    """The folder `root`, which need not exist yet.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     store = Store(Path(folder) / "store")
    ...     store.prepare()
    ...     sorted(path.name for path in store.root.iterdir()), store.stage("large-0123").name
    (['cache', 'format.json', 'runs', 'stages'], 'large-0123')
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def check(self) -> None:
        """Check, without writing, that this version can use the folder as a store.

        Raises
        ------
        UserError
            If `root` is a file, or its ``format.json`` is damaged or from a later version.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"store.root={self.root}: cannot be written (it is a file); name a folder instead")
        file = self.root / FORMAT_FILE
        try:
            found = int(json.loads(file.read_text())["format"])
        except FileNotFoundError:
            # The store does not exist yet, or comes from one of the first versions, which wrote no format.
            return
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{file}: is damaged; a store of this version has {{"format": {FORMAT}}} there') from None
        if found > FORMAT:
            raise UserError(
                f"store.root={self.root}: has format {found}, from a later version of rethink-prune; this one reads "
                f"formats up to {FORMAT}: update it, or name another folder"
            )

    def prepare(self) -> None:
        """Make the folders of the store and check that they, and their file system, can be used.

        Raises
        ------
        UserError
            If :meth:`check` finds a problem, a folder cannot be made or written, or the file system lacks what a store
            needs.
        """
        self.check()
        try:
            if not (self.root / "stages").is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                # Before the folder "stages": a store that has stages but no format is one of the first versions.
                write_json(self.root / FORMAT_FILE, {"format": FORMAT})
            for folder in (self.root / "stages", self.root / "runs", self.cache):
                folder.mkdir(parents=True, exist_ok=True)
            # Permissions do not tell whether a file can be made: quotas and read-only mounts count, too.
            TemporaryFile(dir=self.root / "runs").close()
            check_file_system(self.root / "stages")
        except OSError as error:
            raise UserError(
                f"store.root={self.root}: cannot be written ({error.strerror}); "
                "name a folder you can write with store.root=..."
            ) from error

    @property
    def cache(self) -> Path:
        """Folder for what can be made again at any time: decoded images, compiled code."""
        return self.root / "cache"

    def stage(self, name: str) -> Stage:
        """Return the stage of this name, ``<kind>-<key>``, whether it exists or not."""
        return Stage(self.root / "stages" / name)

    def record_run(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Write which run folder (``run_dir``) uses which stages (``stages``, folder names by part of the study)."""
        write_json(self.root / "runs" / f"{run_id}.json", record)

    def remove_stage(self, name: str) -> bool:
        """Remove a stage while other processes may ask for it; tell whether it is gone: not if one works on it."""
        folder = self.stage(name).folder
        try:
            # Held until the lock file is gone, too: a process that waits for it then sees that, and makes a new one.
            with FileLock(folder / LOCK_FILE, blocking=False):
                # Renamed first, which takes no time: from then on, a process that asks for the stage makes a new one.
                shutil.rmtree(folder.rename(folder.with_name(f"{_PREFIX}{name}-{uuid.uuid4().hex[:8]}")))
        except Timeout:
            return False
        return True

    def finish_removals(self) -> None:
        """Remove what earlier removals left behind because they were stopped halfway."""
        for doomed in (self.root / "stages").glob(f"{_PREFIX}*"):
            # Another process may remove it at the same time.
            shutil.rmtree(doomed, ignore_errors=True)
