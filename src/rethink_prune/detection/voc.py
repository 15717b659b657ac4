"""Read pictures in the layout of PASCAL VOC: those of 2007, which torchvision downloads and verifies, or one's own.

A folder holds pictures in ``JPEGImages/``, a file ``Annotations/<name>.xml`` for every picture, and the names of the
pictures to train on and to test with in ``ImageSets/Main/trainval.txt`` and ``test.txt``. The classes are those named
in the annotations of ``trainval``, sorted.

Boxes
-----
VOC's files number pixels from 1 and name a box's first and last pixel. Here boxes have edges: pixels 1 to `width`
become 0 to `width`. The area stays what VOC's rules count, and one pixel has a width of 1.

Published files are not perfect. Two things are repaired, each with one warning that counts the boxes:

- a box that is one pixel wide or high is a slip of the mouse. There is nothing to learn from it, and no detector can
  find it: it is left out, of training (as in the published code of Faster R-CNN) and of tests;
- a box that reaches one pixel over the edge comes from a program that numbers pixels from 0: it is cut at the edge.

A box that reaches further has wrong coordinates, or belongs to another picture. It is refused.

References
----------
M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import math
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from filelock import FileLock

from rethink_prune.config import TransferConfig
from rethink_prune.data.decoding import describe_failure, read_whole
from rethink_prune.data.listing import IMAGE_ENDINGS
from rethink_prune.detection.pictures import Objects
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator

_log = logging.getLogger(__name__)

_EXPECTED = "expected JPEGImages, Annotations and ImageSets/Main there, in VOC2007 or in VOCdevkit/VOC2007"
_LISTS = {"train": "trainval", "test": "test"}
_ARCHIVES = {"trainval": "2007", "test": "2007-test"}  # torchvision's names
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_Edges = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class VocPictures:
    """Pictures in files; each is decoded when it is asked for.

    Attributes
    ----------
    classes : tuple of str
        Label k is ``classes[k - 1]``.
    files : tuple of Path
        The pictures.
    sizes : tuple of (int, int)
        Their heights and widths, as their annotations say.
    contents : tuple of Objects
        What is in each.
    fingerprint : str
        SHA-256 of classes, names of the pictures, sizes of their files in bytes, and annotations.
    """

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    contents: tuple[Objects, ...]
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def picture(self, index: int) -> torch.Tensor:
        """Return a picture: uint8, 3 x height x width; raise `UserError` if it is damaged or has another size."""
        try:
            pixels = read_whole(np.fromfile(self.files[index], dtype=np.uint8))
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise UserError(f"{self.files[index]}: cannot be read ({describe_failure(error)})") from error
        height, width = self.sizes[index]
        if pixels.shape[1:] != (height, width):
            found = f"{pixels.shape[2]} x {pixels.shape[1]}"
            raise UserError(f"{self.files[index]}: is {found}, its annotation says {width} x {height}")
        return pixels

    def objects(self, index: int) -> Objects:
        """Return what is in it."""
        return self.contents[index]


def read_voc(config: TransferConfig, download_to: Path) -> tuple[VocPictures, VocPictures]:
    """Return the pictures to train on and those to test with, in the order of the lists. Decodes none.

    Pictures with nothing to learn from (no objects, or only difficult ones) are left out of training.

    Parameters
    ----------
    config : TransferConfig
        ``root``, or None to download VOC 2007; ``train_limit`` and ``test_limit``.
    download_to : Path
        Where VOC 2007 is, or is downloaded to.

    Raises
    ------
    UserError
        The folder has another layout, the download fails, a file is missing or damaged, a box is empty or outside of
        its picture, a picture is in both lists, a class is in the tests alone, or a limit is above what there is.
    """
    if config.root is None:
        where, folder = "transfer.name=voc", _find_or_download(download_to.expanduser().absolute())
    else:
        where, folder = f"transfer.root={config.root}", _find_folder(config.root)
    try:
        lists = {side: _read_list(folder, name) for side, name in _LISTS.items()}
        if both := sorted(set(lists["train"]) & set(lists["test"])):
            raise ValueError(f"{both[0]} is in trainval.txt and in test.txt; a picture can only be in one")
        files = _list_pictures(folder)
        sides = {side: [_read_annotation(folder, name, files) for name in names] for side, names in lists.items()}
        classes = _find_classes(sides["train"], sides["test"])
        sides["train"] = [annotation for annotation in sides["train"] if annotation.is_useful]
        train, test = (_draw_subset(sides[side], getattr(config, f"{side}_limit"), side) for side in _LISTS)
    except (OSError, ValueError) as error:
        again = "" if config.root else f"; delete {folder} and run the same command to unpack it again"
        raise UserError(f"{where}: {error}{again}") from error
    _warn_of_repairs(where, [*train, *test])
    return _collect_pictures(train, classes), _collect_pictures(test, classes)


class _Box(NamedTuple):
    """An object as it is marked, its edges in pixels."""

    name: str
    edges: _Edges
    difficult: bool


@dataclass(frozen=True)
class _Annotation:
    """What is known about one picture without decoding it; `slips` and `cut` count boxes that were repaired."""

    name: str
    picture: Path
    picture_bytes: int
    digest: str
    size: tuple[int, int]
    boxes: tuple[_Box, ...]
    slips: int
    cut: int

    @property
    def is_useful(self) -> bool:
        """Whether there is something to train on."""
        return any(not box.difficult for box in self.boxes)


def _find_folder(root: str) -> Path:
    path = Path(root).expanduser().absolute()
    for folder in (path, path / "VOC2007", path / "VOCdevkit" / "VOC2007"):
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise UserError(f"transfer.root={root}: {'has another layout' if path.is_dir() else 'no such folder'}; {_EXPECTED}")


def _find_or_download(root: Path) -> Path:
    folder = root / "VOCdevkit" / "VOC2007"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".voc.lock"):  # runs of one sweep start together: one unpacks, the others wait
            for image_set in _missing_sets(folder):
                from torchvision.datasets import VOCDetection  # takes seconds to import

                VOCDetection(root, year="2007", image_set=image_set, download=True)
    except (OSError, RuntimeError, tarfile.TarError, EOFError, http.client.HTTPException) as error:
        # Where nothing can be written, there is no lock, and nobody who unpacks.
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS) and not _missing_sets(folder):
            return folder
        raise UserError(
            f"transfer.name=voc: could not be downloaded ({error}); put {_name_archives()} into {root}"
        ) from error
    return folder


def _missing_sets(folder: Path) -> list[str]:
    return [name for name in _ARCHIVES if not (folder / "ImageSets" / "Main" / f"{name}.txt").exists()]


def _name_archives() -> str:
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    archives = [DATASET_YEAR_DICT[name] for name in _ARCHIVES.values()]
    return " and ".join(f"{archive['filename']} (md5 {archive['md5']}, from {archive['url']})" for archive in archives)


def _read_list(folder: Path, name: str) -> list[str]:
    """Return the names of pictures in a list."""
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not path.exists():
        raise ValueError(f"ImageSets/Main/{name}.txt is missing; it names the pictures, one a line")
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise ValueError(f"ImageSets/Main/{name}.txt names a picture twice")
    return names


def _list_pictures(folder: Path) -> dict[str, os.DirEntry[str]]:
    """Return the picture files by their names without the ending."""
    with os.scandir(folder / "JPEGImages") as entries:
        found = sorted((e for e in entries if e.name.lower().endswith(IMAGE_ENDINGS)), key=lambda e: e.name)
    return {Path(entry.name).stem: entry for entry in found}


def _read_annotation(folder: Path, name: str, files: Mapping[str, os.DirEntry[str]]) -> _Annotation:
    if name not in files:
        raise ValueError(f"JPEGImages/{name}.jpg is missing")
    try:
        content = (folder / "Annotations" / f"{name}.xml").read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Annotations/{name}.xml is missing") from None
    try:
        tree = ElementTree.fromstring(content)
        width, height = (_read_number(tree, f"size/{side}") for side in ("width", "height"))
        if min(width, height) < 1 or width != int(width) or height != int(height):
            raise ValueError(f"the size is {width:g} x {height:g}")
        marked = [_read_object(node) for node in tree.findall("object")]
        for box in marked:
            _check_box(box, width, height)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"Annotations/{name}.xml: {error}") from error
    # In edges, one pixel is 1 wide.
    boxes = [box for box in marked if min(_extent(box)) > 1]
    inside = [box._replace(edges=_cut_at_edges(box.edges, width, height)) for box in boxes]
    return _Annotation(
        name=name,
        picture=Path(files[name].path),
        picture_bytes=files[name].stat().st_size,
        digest=hashlib.sha256(content).hexdigest(),
        size=(int(height), int(width)),
        boxes=tuple(inside),
        slips=len(marked) - len(boxes),
        cut=sum(box != original for box, original in zip(inside, boxes, strict=True)),
    )


def _read_object(node: ElementTree.Element) -> _Box:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    difficult = (node.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"difficult is {difficult}, must be 0 or 1")
    left, top, right, bottom = (_read_number(node, f"bndbox/{corner}") for corner in _CORNERS)
    return _Box(name, (left - 1, top - 1, right, bottom), difficult == "1")


def _read_number(node: ElementTree.Element, path: str) -> float:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"{node.tag} has no {path}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path} is {text.strip() or 'blank'}, must be a number")
    return value


def _extent(box: _Box) -> tuple[float, float]:
    left, top, right, bottom = box.edges
    return right - left, bottom - top


def _check_box(box: _Box, width: float, height: float) -> None:
    left, top, right, bottom = box.edges
    shown = f"the box of {box.name}, {left + 1:g} {top + 1:g} {right:g} {bottom:g}"
    if min(_extent(box)) <= 0:
        raise ValueError(f"{shown}, is empty: xmax and ymax must be at least xmin and ymin")
    if min(left, top) < -1 or right > width + 1 or bottom > height + 1:
        raise ValueError(f"{shown}, reaches out of the picture, {width:g} x {height:g}")


def _cut_at_edges(edges: _Edges, width: float, height: float) -> _Edges:
    left, top, right, bottom = edges
    return max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)


def _find_classes(train: Sequence[_Annotation], test: Sequence[_Annotation]) -> tuple[str, ...]:
    """Return the classes of the training pictures; the tests must have no others."""
    classes = {box.name for annotation in train for box in annotation.boxes}
    for annotation in test:
        for box in annotation.boxes:
            if box.name not in classes:
                known = ", ".join(sorted(classes)) or "none"
                raise ValueError(
                    f"Annotations/{annotation.name}.xml: no training picture has the class {box.name}; known: {known}"
                )
    return tuple(sorted(classes))


def _draw_subset(annotations: list[_Annotation], limit: int | None, side: str) -> list[_Annotation]:
    """Return so many pictures, in their order. The draw is the same for all studies."""
    if limit is None:
        return annotations
    if limit > len(annotations):
        raise ValueError(f"{side}_limit={limit}: there are only {len(annotations)} pictures")
    # Drawn, not the first ones: a list may be sorted by class or by source.
    order = torch.randperm(len(annotations), generator=derive_generator(0, f"{side}_limit"))
    return [annotations[index] for index in sorted(order[:limit].tolist())]


def _warn_of_repairs(where: str, annotations: Sequence[_Annotation]) -> None:
    for kind, repair in (("slips", "one pixel wide or high: left out"), ("cut", "one pixel over the edge: cut there")):
        repaired = [annotation for annotation in annotations if getattr(annotation, kind)]
        count = sum(getattr(annotation, kind) for annotation in repaired)
        if count:
            first = f"Annotations/{repaired[0].name}.xml"
            _log.warning("%s: boxes that are %s (%d; the first in %s)", where, repair, count, first)


def _collect_pictures(annotations: Sequence[_Annotation], classes: tuple[str, ...]) -> VocPictures:
    labels = {name: label for label, name in enumerate(classes, 1)}
    digest = hashlib.sha256(repr(classes).encode())
    contents = []
    for annotation in annotations:
        digest.update(repr((annotation.name, annotation.picture_bytes, annotation.digest)).encode())
        contents.append(
            Objects(
                torch.tensor([box.edges for box in annotation.boxes], dtype=torch.float32).reshape(-1, 4),
                torch.tensor([labels[box.name] for box in annotation.boxes], dtype=torch.int64),
                torch.tensor([box.difficult for box in annotation.boxes], dtype=torch.bool),
            )
        )
    return VocPictures(
        classes=classes,
        files=tuple(annotation.picture for annotation in annotations),
        sizes=tuple(annotation.size for annotation in annotations),
        contents=tuple(contents),
        fingerprint=digest.hexdigest(),
    )
