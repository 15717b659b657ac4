"""What a store needs of its file system: a rename that replaces a file at once, and locks that other processes see.

Network and object file systems may lack them. Without such a rename, a reader finds half a file. Without such locks,
two processes work on one stage.
"""

import fcntl
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rethink_prune.errors import UserError

_ELSEWHERE = "name a folder on another file system with store.root=..."
# Ends with 0 if the file is locked by somebody else. It imports next to nothing: it takes about 10 ms.
_ASK_FOR_LOCK = """
import fcntl, sys
with open(sys.argv[1], "wb") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(0)
sys.exit(3)
"""
_GOT_IT = 3


def check_file_system(folder: Path) -> None:
    """Check that the file system of a folder can hold a store; takes milliseconds, and leaves nothing behind.

    Several processes may check a folder at once. Whether another machine sees the locks is not checked.

    Raises
    ------
    UserError
        If a rename does not replace a file at once, or another process does not see a lock.
    OSError
        If the folder cannot be written.

    Examples
    --------
    >>> with TemporaryDirectory() as folder:
    ...     check_file_system(Path(folder))
    ...     list(Path(folder).iterdir())
    []
    """
    # A name with a dot is not listed as a stage.
    with TemporaryDirectory(dir=folder, prefix=".check-") as made:
        _check_rename(Path(made), folder)
        _check_locks(Path(made) / "lock", folder)


def _check_rename(made: Path, folder: Path) -> None:
    old, new = made / "old", made / "new"
    old.write_text("old")
    new.write_text("new")
    with old.open() as reader:
        try:
            new.replace(old)
        except OSError as error:
            raise UserError(
                f"{folder}: its file system cannot rename files ({error.strerror}); {_ELSEWHERE}"
            ) from error
        # Where the content is copied instead, a reader that has the old file open sees the new content, or half of it.
        if new.exists() or old.read_text() != "new" or reader.read() != "old":
            raise UserError(f"{folder}: its file system does not replace a file at once; {_ELSEWHERE}")


def _check_locks(lock: Path, folder: Path) -> None:
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: its file system has no file locks ({error.strerror}); {_ELSEWHERE}") from error
        # A process of its own: some file systems, and some wrappers around them, keep locks to the process.
        # A session of its own: the terminal's Ctrl-C is for this process alone.
        asked = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK_FOR_LOCK, lock],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            check=False,
        )
        if asked.returncode == _GOT_IT:
            raise UserError(f"{folder}: its file system hides file locks from other processes; {_ELSEWHERE}")
        if asked.returncode != 0:
            raise UserError(f"{folder}: another process cannot ask for a lock: {asked.stderr.strip()}")
