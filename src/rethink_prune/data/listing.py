"""List a folder of images: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val`` instead of ``test``).

Classes are the folders' names, sorted. Images of a class are its files with a usual image ending, sorted by name. Other
files and hidden files do not count.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rethink_prune.data.source import ImageFiles
from rethink_prune.errors import UserError

EXPECTED_FOLDERS = "expected train/<class>/* and test/<class>/*"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def list_image_folder(root: str, *, decode_once: bool) -> tuple[tuple[str, ...], ImageFiles, ImageFiles]:
    """Return the classes, the training images and the test images of a folder.

    Parameters
    ----------
    root : str
        The folder, as a user typed it.
    decode_once : bool
        Whether the images will be decoded once and kept; then the files' sizes and times of modification are listed
        too, which takes a system call for every file.

    Raises
    ------
    UserError
        The folder is missing, empty, has no test images, fewer than two classes, a class without images, or other
        classes in test than in train.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> root = pathlib.Path(folder.name)
    >>> for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png"):
    ...     (root / name).parent.mkdir(parents=True)
    ...     (root / name).touch()
    >>> classes, train, test = list_image_folder(str(root), decode_once=False)
    >>> classes, train.name(1), test.labels.tolist()
    (('cat', 'dog'), 'train/dog/1.png', [0, 1])
    """
    folder = Path(root).expanduser().absolute()
    try:
        test_name = _find_test_folder(folder)
        classes, test_classes = (_subfolders(folder / side) for side in ("train", test_name))
        _check_classes(folder, classes, test_name, test_classes)
        train, test = (_list_side(folder, side, classes, decode_once) for side in ("train", test_name))
    except OSError as error:  # no permission, or a link to nowhere
        raise UserError(f"dataset.root={root}: cannot be listed ({error})") from error
    return tuple(classes), train, test


def _find_test_folder(root: Path) -> str:
    """Check which folders there are, and return the name of the one with test images, ``"test"`` or ``"val"``."""
    where = f"dataset.root={root}"
    if not root.exists():
        raise UserError(f"{where}: no such folder; {EXPECTED_FOLDERS}")
    if not root.is_dir():
        raise UserError(f"{where}: is a file, not a folder; {EXPECTED_FOLDERS}")
    names = _subfolders(root)
    if not names:
        raise UserError(f"{where}: has no folders in it; {EXPECTED_FOLDERS}")
    if "train" not in names:
        raise UserError(f"{where}: has no train folder, only {_join_some(names)}; {EXPECTED_FOLDERS}")
    found = [name for name in ("test", "val") if name in names]
    if not found:
        raise UserError(f"{where}: has neither a test nor a val folder; {EXPECTED_FOLDERS}")
    if len(found) > 1:
        raise UserError(
            f"{where}: has both test and val; keep one under that name (dataset.validation holds out a part of train)"
        )
    return found[0]


def _check_classes(root: Path, train: Sequence[str], test_name: str, test: Sequence[str]) -> None:
    where = f"dataset.root={root}"
    if len(train) < 2:
        found = f"one class ({train[0]})" if train else "no class folders"
        raise UserError(f"{where}: train has {found}, two or more are needed; {EXPECTED_FOLDERS}")
    if train != test:
        only = {"train": sorted(set(train) - set(test)), test_name: sorted(set(test) - set(train))}
        differences = "; ".join(f"only in {side}: {_join_some(names)}" for side, names in only.items() if names)
        raise UserError(f"{where}: train and {test_name} have different classes; {differences}")


def _list_side(root: Path, side: str, classes: Sequence[str], decode_once: bool) -> ImageFiles:
    names: list[bytes] = []
    versions: list[tuple[int, int]] = []
    counts = []
    for name in classes:
        found = _list_class(root, f"{side}/{name}")
        names += [os.fsencode(f"{side}/{name}/{entry.name}") for entry in found]
        if decode_once:
            versions += [(entry.stat().st_size, entry.stat().st_mtime_ns) for entry in found]
        counts.append(len(found))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return ImageFiles(root, np.array(names), labels, np.array(versions, dtype=np.int64) if decode_once else None)


def _list_class(root: Path, folder: str) -> list[os.DirEntry[str]]:
    """Return the image files of a class, sorted by name; there is at least one."""
    found = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            # Some systems leave hidden files beside images: ._cat.jpg
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                raise UserError(f"dataset.root={root}: {folder}/{entry.name} is a folder; classes hold images only")
            if entry.name.lower().endswith(IMAGE_ENDINGS):
                found.append(entry)
    if not found:
        raise UserError(f"dataset.root={root}: no image in {folder}; images end in {' '.join(IMAGE_ENDINGS)}")
    # File systems list in any order; subsets are drawn by position.
    return sorted(found, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _join_some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
