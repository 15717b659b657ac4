"""Images in folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val`` instead of ``test``).

Classes are the folders' names, sorted; images of a class are its files with a usual image ending, sorted by
name, and other or hidden files do not count. Images are decoded once; :mod:`rethink_prune.data.decoding`
keeps the result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from rethink_prune.data.decoding import ImageFile, decode_cached
from rethink_prune.data.source import Contents, Pool, Source
from rethink_prune.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_EXPECTED = "expected train/<class>/* and test/<class>/*"


@dataclass(frozen=True)
class _Side:
    """The image files of train or test, class by class, and their labels."""

    files: tuple[ImageFile, ...]
    counts: tuple[int, ...]

    def labels(self) -> torch.Tensor:
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))


def folder_source(*, root: str | None, image_size: int | None, channels: int) -> Source:
    """List the folder `root` and check that it can be trained on; decodes nothing.

    Parameters
    ----------
    root : str
        The folder that holds ``train`` and ``test`` or ``val``.
    image_size : int or None
        Height and width in pixels. None: all images must be square and of one size, which is kept.
    channels : int
        3 for colour, 1 for grey.

    Raises
    ------
    UserError
        The folder is missing, empty, has no test images, fewer than two classes, a class without images, or
        other classes in test than in train; or the first image is not square and `image_size` is None.
    """
    if root is None:
        raise UserError(f"dataset.root=null: give the folder of the images; {_EXPECTED}")
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: must be 3 (colour) or 1 (grey)")
    folder = Path(root).expanduser().absolute()
    try:
        test_name, classes = find_classes(folder)
        train = _list_side(folder, "train", classes)
        test = _list_side(folder, test_name, classes)
    except OSError as error:  # no permission, or a link to nowhere
        raise UserError(f"dataset.root={root}: cannot be listed ({error})") from error
    size = image_size or _size_of_first(folder, train.files[0])

    def read(cache_dir: Path, progress: bool) -> Contents:
        def pool(side: _Side, name: str) -> Pool:
            def decode(indices: torch.Tensor) -> torch.Tensor:
                return decode_cached(
                    folder,
                    [side.files[i] for i in indices.tolist()],
                    size=size,
                    resize=image_size is not None,
                    channels=channels,
                    cache_dir=cache_dir,
                    progress=f"decoding {name}" if progress else None,
                )

            return Pool(side.labels(), decode)

        return Contents(
            classes=tuple(classes),
            train=pool(train, "train"),
            test=pool(test, test_name),
            in_memory=False,
        )

    return Source(
        image_size=size,
        channels=channels,
        train_counts=train.counts,
        test_counts=test.counts,
        open=read,
    )


def find_classes(root: Path) -> tuple[str, list[str]]:
    """Return the name of the folder of test images, and the classes, sorted; an error names what is wrong."""
    test_name = _check_layout(root)
    train, test = _subfolders(root / "train"), _subfolders(root / test_name)
    _check_classes(root, train, test_name, test)
    return test_name, train


def list_images(root: Path, side: str, name: str) -> list[os.DirEntry[str]]:
    """Return the image files of a class, sorted by name; there is at least one."""
    found = []
    with os.scandir(root / side / name) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                raise UserError(
                    f"dataset.root={root}: {side}/{name}/{entry.name} is a folder; classes hold images only"
                )
            if entry.name.lower().endswith(IMAGE_ENDINGS) and not entry.name.startswith("."):
                found.append(entry)
    if not found:
        raise UserError(f"dataset.root={root}: no image in {side}/{name}; images end in {' '.join(IMAGE_ENDINGS)}")
    return sorted(found, key=lambda entry: entry.name)


def _check_layout(root: Path) -> str:
    """Return the name of the folder of test images: ``"test"`` or ``"val"``."""
    if not root.exists():
        raise UserError(f"dataset.root={root}: no such folder; {_EXPECTED}")
    if not root.is_dir():
        raise UserError(f"dataset.root={root}: is a file, not a folder; {_EXPECTED}")
    names = _subfolders(root)
    if not names:
        raise UserError(f"dataset.root={root}: has no folders in it; {_EXPECTED}")
    if "train" not in names:
        raise UserError(f"dataset.root={root}: has no train folder, only {_some(names)}; {_EXPECTED}")
    if "test" in names and "val" in names:
        raise UserError(
            f"dataset.root={root}: has both test and val; keep one under that name "
            "(dataset.validation holds out a part of train)"
        )
    for name in ("test", "val"):
        if name in names:
            return name
    raise UserError(f"dataset.root={root}: has neither a test nor a val folder; {_EXPECTED}")


def _check_classes(root: Path, train: Sequence[str], test_name: str, test: Sequence[str]) -> None:
    where = f"dataset.root={root}"
    if len(train) < 2:
        found = f"one class ({train[0]})" if train else "no class folders"
        raise UserError(f"{where}: train has {found}, two or more are needed; {_EXPECTED}")
    if train != test:
        only = {"train": sorted(set(train) - set(test)), test_name: sorted(set(test) - set(train))}
        differences = "; ".join(f"only in {side}: {_some(names)}" for side, names in only.items() if names)
        raise UserError(f"{where}: train and {test_name} have different classes; {differences}")


def _list_side(root: Path, side: str, classes: Sequence[str]) -> _Side:
    files: list[ImageFile] = []
    counts = []
    for name in classes:
        found = list_images(root, side, name)
        for entry in found:
            status = entry.stat()
            files.append(ImageFile(f"{side}/{name}/{entry.name}", status.st_size, status.st_mtime_ns))
        counts.append(len(found))
    return _Side(tuple(files), tuple(counts))


def _size_of_first(root: Path, file: ImageFile) -> int:
    """Read the size of an image from its header."""
    try:
        with Image.open(root / file.name) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"dataset.root={root}: cannot read {file.name} ({error})") from error
    if width != height:
        raise UserError(f"dataset.root={root}: {file.name} is {width} x {height}; set dataset.image_size")
    return width


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
