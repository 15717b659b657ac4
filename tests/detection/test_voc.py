"""Folders in VOC's layout: what is read, what is repaired, what is refused, and how VOC 2007 is downloaded."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rethink_prune.config import TransferConfig
from rethink_prune.detection import DetectionData, load_detection
from rethink_prune.errors import UserError

Mark = tuple[str, int, int, int, int]
WIDTH, HEIGHT = 40, 30
CAT: Mark = ("cat", 1, 1, WIDTH, HEIGHT)
DOG: Mark = ("dog", 5, 6, 14, 25)


def xml(marks: Sequence[Mark], difficult: str = "0") -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox><part><name>head</name></part></object>"
        for name, a, b, c, d in marks
    )
    return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{objects}</annotation>"


def write(folder: Path, annotations: dict[str, str], lists: dict[str, Sequence[str]]) -> Path:
    """Write a folder in VOC's layout; the grey of a picture is its number."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (name, text) in enumerate(annotations.items()):
        (folder / f"Annotations/{name}.xml").write_text(text)
        pixels = np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg", quality=100)
    for name, pictures in lists.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{picture}\n" for picture in pictures))
    return folder


def write_small(folder: Path, **changed: str) -> Path:
    """Write four pictures; `changed` replaces annotations."""
    annotations = {"a": xml([CAT, DOG]), "b": xml([]), "c": xml([DOG]), "d": xml([]), **changed}
    return write(folder, annotations, {"trainval": ["a", "b"], "test": ["c", "d"]})


def load(root: Path, **options: Any) -> DetectionData:
    return load_detection(TransferConfig(name="voc", epochs=1, lr=0.01, root=str(root), **options), root / "unused")


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(root, **options)
    message = str(error.value)
    assert message.startswith(f"transfer.root={root}: ")
    return message.removeprefix(f"transfer.root={root}: ")


@pytest.mark.parametrize("inner", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_a_folder_is_read_and_pictures_without_objects_are_only_tested(tmp_path: Path, inner: str) -> None:
    write_small(tmp_path / inner)
    data = load(tmp_path)
    assert data.train.classes == data.test.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (1, 2)
    assert data.train.sizes == ((HEIGHT, WIDTH),)
    objects = data.train.objects(0)
    # Pixels 1 to 40 are the edges 0 to 40.
    assert objects.boxes.tolist() == [[0, 0, WIDTH, HEIGHT], [4, 5, 14, 25]]
    assert (objects.boxes.dtype, objects.labels.dtype, objects.difficult.dtype) == (
        torch.float32,
        torch.int64,
        torch.bool,
    )
    assert (objects.labels.tolist(), objects.difficult.tolist()) == ([1, 2], [False, False])
    assert data.test.objects(1).boxes.shape == (0, 4)
    picture = data.test.picture(0)
    assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert (picture.int() - 20).abs().max() <= 2


def test_pictures_with_difficult_objects_alone_are_left_out_of_training(tmp_path: Path) -> None:
    data = load(write_small(tmp_path, b=xml([DOG], difficult="1"), d=xml([DOG], difficult="1")))
    assert len(data.train) == 1
    assert data.test.objects(1).difficult.tolist() == [True]


def test_slips_are_left_out_and_boxes_one_pixel_over_the_edge_are_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slips = [("cat", 7, 7, 7, 7), ("dog", 7, 7, 7, 20)]
    write_small(tmp_path, a=xml([*slips, ("dog", 0, 0, 12, HEIGHT), DOG]), c=xml([("dog", 20, 7, WIDTH + 1, 12)]))
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path)
    assert data.train.classes == ("dog",)
    assert data.train.objects(0).boxes.tolist() == [[0, 0, 12, HEIGHT], [4, 5, 14, 25]]
    assert data.test.objects(0).boxes.tolist() == [[19, 6, WIDTH, 12]]
    assert [record.getMessage().removeprefix(f"transfer.root={tmp_path}: ") for record in caplog.records] == [
        "boxes that are one pixel wide or high: left out (2; the first in Annotations/a.xml)",
        "boxes that are one pixel over the edge: cut there (2; the first in Annotations/a.xml)",
    ]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("<annotation><size>", "no element found: line 1, column 18"),
        ("<annotation/>", "annotation has no size/width"),
        (xml([("cat", 1, 1, WIDTH + 2, 9)]), "the box of cat, 1 1 42 9, reaches out of the picture, 40 x 30"),
        (xml([("cat", -1, 1, 9, 9)]), "the box of cat, -1 1 9 9, reaches out of the picture, 40 x 30"),
        (
            xml([("cat", 9, 1, 5, 9)]),
            "the box of cat, 9 1 5 9, is empty: xmax and ymax must be at least xmin and ymin",
        ),
        (xml([CAT]).replace("<ymin>1<", "<ymin>one<"), "bndbox/ymin is one, must be a number"),
        (xml([CAT]).replace("<ymin>1</ymin>", ""), "object has no bndbox/ymin"),
        (xml([CAT]).replace("<name>cat<", "<name> <"), "an object has no name"),
        (xml([CAT], difficult="yes"), "difficult is yes, must be 0 or 1"),
        (xml([CAT]).replace(f"<width>{WIDTH}", "<width>0"), "the size is 0 x 30"),
    ],
)
def test_a_bad_annotation_is_refused_by_its_name(tmp_path: Path, annotation: str, message: str) -> None:
    assert refusal(write_small(tmp_path, c=annotation)) == f"Annotations/c.xml: {message}"


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("Annotations/c.xml", "JPEGImages/d.jpg", "ImageSets/Main/test.txt"):
        root = write_small(tmp_path / Path(name).stem)
        (root / name).unlink()
        assert refusal(root).startswith(f"{name} is missing")
    root = write_small(tmp_path / "no pictures")
    shutil.rmtree(root / "JPEGImages")
    assert "JPEGImages" in refusal(root)
    assert refusal(tmp_path / "nothing").startswith("no such folder; expected JPEGImages, Annotations and ImageSets")


def test_a_set_that_cannot_be_learned_or_tested_is_refused(tmp_path: Path) -> None:
    unknown = write_small(tmp_path / "1", c=xml([("cow", 1, 1, 9, 9)]))
    assert refusal(unknown) == "Annotations/c.xml: no training picture has the class cow; known: cat, dog"
    untested = write_small(tmp_path / "2", c=xml([DOG], difficult="1"))
    assert refusal(untested) == "no boxes in the pictures to test with, or only difficult objects"
    untrained = write_small(tmp_path / "3", a=xml([DOG], difficult="1"))
    assert refusal(untrained) == "no boxes in the pictures to train on, or only difficult objects"
    shared = write(tmp_path / "4", {"a": xml([DOG])}, {"trainval": ["a"], "test": ["a"]})
    assert refusal(shared) == "a is in trainval.txt and in test.txt; a picture can only be in one"
    twice = write(tmp_path / "5", {"a": xml([DOG])}, {"trainval": ["a", "a"], "test": []})
    assert refusal(twice) == "ImageSets/Main/trainval.txt names a picture twice"


def test_a_picture_that_is_damaged_or_of_another_size_is_named_when_it_is_read(tmp_path: Path) -> None:
    data = load(write_small(tmp_path))
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "JPEGImages/c.jpg")
    with pytest.raises(UserError, match=r"JPEGImages/c.jpg: is 30 x 40, its annotation says 40 x 30$"):
        data.test.picture(0)
    (tmp_path / "JPEGImages/c.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"JPEGImages/c.jpg: cannot be read \(not an image\)$"):
        data.test.picture(0)


def test_limits_draw_the_same_pictures_every_time_and_keep_the_classes(tmp_path: Path) -> None:
    names = [f"p{index}" for index in range(20)]
    marks = {name: xml([CAT if index == 0 else DOG]) for index, name in enumerate(names)}
    root = write(tmp_path, marks, {"trainval": names[:10], "test": names[10:]})
    first, again = (load(root, train_limit=4, test_limit=3) for _ in range(2))
    assert (len(first.train), len(first.test), first.train.classes) == (4, 3, ("cat", "dog"))
    assert first.train.fingerprint == again.train.fingerprint
    assert refusal(root, train_limit=11) == "train_limit=11: there are only 10 pictures"


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = write_small(tmp_path / "one"), write_small(tmp_path / "elsewhere/VOC2007")
    first = load(one)
    assert load(other.parent).test.fingerprint == first.test.fingerprint
    assert first.train.fingerprint != first.test.fingerprint
    (other / "Annotations/d.xml").write_text(xml([DOG]))
    changed = load(other.parent)
    assert changed.test.fingerprint != first.test.fingerprint
    assert changed.train.fingerprint == first.train.fingerprint


class FakeArchives:
    """Archives with the names of VOC 2007's, which no server offers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets.voc import DATASET_YEAR_DICT

        whole = write_small(folder / "made/VOCdevkit/VOC2007")
        self.paths = []
        for entry, side, other in (("2007", "trainval", "test"), ("2007-test", "test", "trainval")):
            part = folder / side
            shutil.copytree(folder / "made", part)
            (part / whole.relative_to(folder / "made") / f"ImageSets/Main/{other}.txt").unlink()
            archive = folder / DATASET_YEAR_DICT[entry]["filename"]
            with tarfile.open(archive, "w") as tar:
                tar.add(part / "VOCdevkit", "VOCdevkit")
            changed = {
                "url": f"http://127.0.0.1:9/{archive.name}",
                "md5": hashlib.md5(archive.read_bytes()).hexdigest(),
            }
            monkeypatch.setitem(DATASET_YEAR_DICT, entry, {**DATASET_YEAR_DICT[entry], **changed})
            self.paths.append(archive)


def refuse_to_write(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_voc_2007_is_unpacked_once_and_offline_says_which_files_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = FakeArchives(tmp_path, monkeypatch)
    config, datasets = TransferConfig(name="voc", epochs=1, lr=0.01), tmp_path / "datasets"
    with pytest.raises(UserError) as error:
        load_detection(config, datasets)
    message = str(error.value)
    assert message.startswith("transfer.name=voc: could not be downloaded (")
    for path in archives.paths:
        assert f"{path.name} (md5 {hashlib.md5(path.read_bytes()).hexdigest()}, from http" in message
    assert message.endswith(f" into {datasets}")

    for path in archives.paths:
        shutil.copy(path, datasets)
    data = load_detection(config, datasets)
    assert (len(data.train), len(data.test), data.train.classes) == (1, 2, ("cat", "dog"))
    # What is unpacked is enough.
    for path in archives.paths:
        (datasets / path.name).unlink()
    assert load_detection(config, datasets).test.fingerprint == data.test.fingerprint

    # So it is on a disk that takes no lock. (Permissions would not stop a test that is run by root.)
    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", refuse_to_write)
        assert load_detection(config, datasets).test.fingerprint == data.test.fingerprint
        with pytest.raises(UserError, match=r"could not be downloaded \(.*Permission denied"):
            load_detection(config, tmp_path / "other")

    # A process that was killed while it unpacked.
    (datasets / "VOCdevkit/VOC2007/JPEGImages/c.jpg").unlink()
    with pytest.raises(UserError) as error:
        load_detection(config, datasets)
    assert str(error.value) == (
        f"transfer.name=voc: JPEGImages/c.jpg is missing; delete {datasets / 'VOCdevkit/VOC2007'} and run the same "
        "command to unpack it again"
    )
