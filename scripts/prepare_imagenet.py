"""Unpack ImageNet (ILSVRC 2012) into image folders: TARGET/train/<wnid>/*.JPEG, TARGET/val/<wnid>/*.JPEG.

    python scripts/prepare_imagenet.py --archives downloads --target imagenet
    python -m rethink_prune experiment=l1_resnet34_a_imagenet dataset.root=imagenet

ARCHIVES holds the three files that https://image-net.org gives to those who accept its terms:
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. They are checked against their
official MD5 sums before anything is unpacked; validation images get their classes from the development kit.

Run the command again after it was stopped: classes that are finished stay, and archives that were found intact are
not read through again. A folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import scipy.io
from tqdm import tqdm

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
DAMAGED = (tarfile.TarError, EOFError, zlib.error)
VERIFIED = ".verified.json"


class BadArchiveError(Exception):
    """An archive is missing, damaged or not what its name says."""


@dataclass(frozen=True)
class Kit:
    """What the development kit says.

    Attributes
    ----------
    train_images : dict of str to int
        Training images of each class, by WordNet ID.
    val_wnids : list of str
        Classes of the validation images, in the order of their numbers.
    """

    train_images: dict[str, int]
    val_wnids: list[str]


def main() -> None:
    options = parse_arguments()
    try:
        prepare(options.archives, options.target, verify=not options.skip_checksums)
    except BadArchiveError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error}; run the same command again to go on")
    print(f"{options.target} is complete: python -m rethink_prune dataset=imagenet dataset.root={options.target}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, required=True, metavar="FOLDER", help="where the three archives are")
    parser.add_argument("--target", type=Path, required=True, metavar="FOLDER", help="gets train/ and val/ (145 GB)")
    parser.add_argument("--skip-checksums", action="store_true", help="trust the archives; their counts are checked")
    return parser.parse_args()


def prepare(archives: Path, target: Path, *, verify: bool = True) -> None:
    """Make `target` from the archives, or what is missing of it.

    Raises
    ------
    BadArchiveError
        If an archive is missing, damaged, or holds something else than it should.
    OSError
        If `target` cannot be written.
    """
    kit_file = find(archives, DEVKIT)
    target.mkdir(parents=True, exist_ok=True)
    if verify:
        check_sum(kit_file, target / VERIFIED)
    kit = read_kit(kit_file)
    missing = [wnid for wnid in kit.train_images if not (target / "train" / wnid).exists()]
    if missing:
        train = find(archives, TRAIN)
        if verify:
            check_sum(train, target / VERIFIED)
        unpack_train(train, target / "train", kit.train_images)
    if not (target / "val").exists():
        val = find(archives, VAL)
        if verify:
            check_sum(val, target / VERIFIED)
        unpack_val(val, target, kit.val_wnids)


def find(archives: Path, name: str) -> Path:
    path = archives / name
    if not path.is_file():
        raise BadArchiveError(f"--archives {archives}: {name} is not there; https://image-net.org has it")
    return path


def check_sum(archive: Path, record: Path) -> None:
    """Compare an archive's MD5 sum with the official one; what was found intact is noted in `record`."""
    status = archive.stat()
    identity = [str(archive.resolve()), status.st_size, status.st_mtime_ns]
    verified = json.loads(record.read_text()) if record.exists() else []
    if identity in verified:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file, progress(f"checking {archive.name}", status.st_size, "B") as bar:
        while chunk := file.read(2**22):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != MD5[archive.name]:
        raise BadArchiveError(
            f"{archive}: is damaged: its MD5 sum is {digest.hexdigest()}, not {MD5[archive.name]}; download it again"
        )
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps([*verified, identity]))
    partial.replace(record)


def read_kit(archive: Path) -> Kit:
    """Read classes and validation labels from the development kit."""
    try:
        with tarfile.open(archive) as tar:
            files = {Path(entry.name).name: entry for entry in tar if entry.isfile()}
            meta, truth = (read(tar, files[name]) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        counts = {str(synset["WNID"]): int(synset["num_train_images"]) for synset in leaves}
        labels = [wnids[int(line)] for line in truth.split()]
    except (*DAMAGED, OSError, KeyError, ValueError, TypeError) as error:
        raise BadArchiveError(f"{archive}: is not the development kit, or is damaged ({error!r})") from error
    for wnid in counts:
        if not re.fullmatch(r"n\d{8}", wnid):
            raise BadArchiveError(f"{archive}: {wnid!r} is not a WordNet ID")
    return Kit(dict(sorted(counts.items())), labels)


def unpack_train(archive: Path, target: Path, expected: dict[str, int]) -> None:
    """Unpack the archives of the classes that are inside of `archive`; each becomes a folder when it is complete."""
    seen = set()
    with progress("train", len(expected), "class") as bar, opened(archive) as tar:
        for entry in members(archive, tar):
            wnid = entry.name.removesuffix(".tar")
            if wnid not in expected or not entry.name.endswith(".tar"):
                raise BadArchiveError(f"{archive}: holds {entry.name!r}, which is not the archive of a class")
            seen.add(wnid)
            if not (target / wnid).exists():
                inner_name = f"{archive}: {entry.name}"
                partial = target / f".{wnid}.partial"
                partial.mkdir(parents=True, exist_ok=True)
                with opened(archive, tar.extractfile(entry), inner_name) as inner:
                    count = unpack(inner_name, inner, lambda name, partial=partial: partial)  # type: ignore[misc]
                check_count(inner_name, count, expected[wnid])
                partial.rename(target / wnid)
            bar.update(1)
    if missing := sorted(set(expected) - seen):
        raise BadArchiveError(f"{archive}: ends too early: {len(missing)} classes are missing, {missing[0]} among them")


def unpack_val(archive: Path, target: Path, wnids: list[str]) -> None:
    """Unpack the validation images into folders of their classes."""
    partial = target / ".val.partial"
    for wnid in set(wnids):
        (partial / wnid).mkdir(parents=True, exist_ok=True)

    def folder(name: str) -> Path:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if number is None or not 1 <= int(number[1]) <= len(wnids):
            raise BadArchiveError(f"{archive}: holds {name!r}, which is no validation image")
        return partial / wnids[int(number[1]) - 1]

    with progress("val", len(wnids), "image") as bar, opened(archive) as tar:
        check_count(str(archive), unpack(str(archive), tar, folder, bar), len(wnids))
    partial.rename(target / "val")


def unpack(title: str, tar: tarfile.TarFile, folder: Callable[[str], Path], bar: tqdm[None] | None = None) -> int:
    """Write every file of `tar` into the folder that is named for it, and return how many there were."""
    names: Counter[str] = Counter()
    for entry in members(title, tar):
        if not re.fullmatch(r"[A-Za-z0-9_]+\.JPEG", entry.name):
            raise BadArchiveError(f"{title}: holds {entry.name!r}, which is no name of an image")
        names[entry.name] += 1
        path = folder(entry.name) / entry.name
        if not (path.exists() and path.stat().st_size == entry.size):  # else it is from a run that was stopped
            content = read(tar, entry, title)
            path.write_bytes(content)
        if bar is not None:
            bar.update(1)
    return len(names)


def members(title: object, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Go through an archive, which may hold regular files only."""
    try:
        for entry in tar:
            if not entry.isreg():
                raise BadArchiveError(f"{title}: holds {entry.name!r}, which is not a regular file")
            yield entry
    except DAMAGED as error:
        raise BadArchiveError(f"{title}: is truncated or damaged ({error}); download it again") from error


def opened(archive: Path, file: IO[bytes] | None = None, title: object = None) -> tarfile.TarFile:
    try:
        return tarfile.open(archive if file is None else None, "r:", fileobj=file)
    except DAMAGED as error:
        raise BadArchiveError(f"{title or archive}: is no archive, or damaged ({error}); download it again") from error


def read(tar: tarfile.TarFile, entry: tarfile.TarInfo, title: object = None) -> bytes:
    try:
        file = tar.extractfile(entry)
        content = b"" if file is None else file.read()
    except DAMAGED:
        content = b""
    if len(content) != entry.size:
        raise BadArchiveError(f"{title or tar.name}: is truncated in {entry.name}; download it again")
    return content


def check_count(title: str, found: int, expected: int) -> None:
    if found != expected:
        raise BadArchiveError(f"{title}: holds {found} images instead of {expected}; download it again")


def progress(title: str, total: int, unit: str) -> tqdm[None]:
    return tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=None)


if __name__ == "__main__":
    main()
