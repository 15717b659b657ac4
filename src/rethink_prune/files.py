"""Writing files so that a crash leaves the old content or the new; and where shared files are."""

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError

SUMMARY_FILE = "summary.json"  # what a run leaves
DETECTIONS_FILE = "detections.png"  # a few test pictures with what a detector found, in its stage
COST_FILE = "cost.json"  # what its networks take, where they have been measured


def conf_dir() -> str:
    """Return the folder of the shipped configuration: in the wheel, or beside ``src`` in a checkout.

    Examples
    --------
    >>> (Path(conf_dir()) / "config.yaml").exists()
    True
    """
    package = Path(__file__).resolve().parent
    shipped = package / "conf"
    return str(shipped if shipped.is_dir() else package.parents[1] / "conf")


def check_folder(path: Path, option: str) -> None:
    """Raise `UserError`, in which `option` is named, if there cannot be a folder at `path`, since a file is in the way.

    Examples
    --------
    >>> with tempfile.NamedTemporaryFile(dir=".", prefix="file-") as file:
    ...     check_folder(Path(file.name) / "runs", "hydra.run.dir=file/runs")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    rethink_prune.errors.UserError: hydra.run.dir=file/runs: ...file-... is a file; name a folder
    """
    existing = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if existing.is_file():
        raise UserError(f"{option}: {existing} is a file; name a folder")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to a temporary file beside `path`, sync it to the disk, and rename it to `path`.

    Raises
    ------
    UserError
        If the disk is full or the folder cannot be written; the old content of `path` is intact then.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "status.json", b"{}")
    ...     os.listdir(folder)
    ['status.json']
    """
    temporary = None
    try:
        # In the same folder: a rename is atomic only within one file system.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Without this, a power cut after the rename may leave an empty file under the new name.
            os.fsync(file.fileno())
        # mkstemp lets only the owner read; a store may be shared.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "nothing finished so far is lost: free some space and run the same command again"
            raise UserError(f"{path}: the disk is full ({error.strerror}); {advice}") from error
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically; indented for readers, or in one line.

    Raises
    ------
    ValueError
        If it holds NaN or infinity, which are no JSON.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "plan.json", {"epochs": 160})
    ...     print((Path(folder) / "plan.json").read_text(), end="")
    {
      "epochs": 160
    }
    """
    write_atomically(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Examples
    --------
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     file_digest(Path(file.name))[:16]
    'e3b0c44298fc1c14'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
