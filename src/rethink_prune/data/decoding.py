"""Decode image files into one array of bytes, and keep the array in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from rethink_prune.errors import UserError

_log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
_MODES = {1: "L", 3: "RGB"}
_CHUNK = 64  # files per task: one by one, handing over the tasks takes as long as decoding 32 x 32 pixels
_SMALL_FILE = 4096  # bytes; about 64 x 64 pixels of JPEG
_SHOWN = 10  # files named in an error


class ImageFile(NamedTuple):
    """A file as it was when it was listed.

    Attributes
    ----------
    name : str
        Path inside the data set's folder, with forward slashes.
    size : int
        Bytes.
    modified : int
        Time of last modification, nanoseconds.
    """

    name: str
    size: int
    modified: int


class _WrongSizeError(ValueError):
    """An image of another size than the rest, where none was asked for."""


def decode_cached(
    root: Path,
    files: Sequence[ImageFile],
    *,
    size: int,
    resize: bool,
    channels: int,
    cache_dir: Path,
    progress: str | None,
) -> torch.Tensor:
    """Return the images of `files`, decoded now or at an earlier time.

    The result is kept in `cache_dir` under a name made of the path, size and modification time of every file
    and of how they were decoded, so a changed folder is decoded anew. Older results stay until somebody
    deletes them.

    Parameters
    ----------
    root : Path
        The folder that the files' names are relative to, absolute.
    files : sequence of ImageFile
        What to decode, in this order.
    size : int
        Height and width of the result, in pixels.
    resize : bool
        Scale the shorter side to `size` (bilinear, antialiased) and crop the centre; otherwise images must
        have that size.
    channels : int
        3 for colour, 1 for grey.
    cache_dir : Path
        Where results are kept.
    progress : str or None
        Label of a progress bar, which is only drawn on a terminal; None draws none.

    Returns
    -------
    torch.Tensor
        uint8, N x size x size x channels.

    Raises
    ------
    UserError
        Images cannot be read or have the wrong size (then nothing is kept), or the result cannot be written.
    """
    shape = (len(files), size, size, channels)
    entry = cache_dir / f"{_cache_key(root, files, size=size, resize=resize, channels=channels)}.npz"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # One of several runs that start together decodes, the others wait and read.
        with FileLock(entry.with_suffix(".lock")):
            images = _read_entry(entry, shape)
            if images is None:
                images = _decode(root, files, size=size, resize=resize, channels=channels, progress=progress)
                _write_entry(entry, images)
    except OSError as error:
        raise UserError(f"{cache_dir}: cannot keep the decoded images here ({error})") from error
    return torch.from_numpy(images)


def _cache_key(root: Path, files: Sequence[ImageFile], *, size: int, resize: bool, channels: int) -> str:
    made_of = [str(root), size, resize, channels, files]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _read_entry(entry: Path, shape: tuple[int, ...]) -> Bytes | None:
    """Return a kept array, or None if there is none or it is damaged; its checksum is verified in reading."""
    try:
        with np.load(entry, allow_pickle=False) as archive:
            images: Bytes = archive["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"holds {images.dtype} of shape {images.shape}")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged (%s): decoding the images again", entry, error)
        return None
    return images


def _write_entry(entry: Path, images: Bytes) -> None:
    partial = entry.with_suffix(".partial")  # the lock's holder is its only writer
    with partial.open("wb") as file:
        np.savez(file, images=images)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(entry)


def _decode(
    root: Path, files: Sequence[ImageFile], *, size: int, resize: bool, channels: int, progress: str | None
) -> Bytes:
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)

    def decode_chunk(start: int) -> list[tuple[ImageFile, Exception]]:
        problems: list[tuple[ImageFile, Exception]] = []
        for i in range(start, min(start + _CHUNK, len(files))):
            try:
                images[i] = _decode_file(root / files[i].name, size=size, resize=resize, channels=channels)
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                problems.append((files[i], error))
        return problems

    problems = []
    # Threads do, since Pillow releases the interpreter's lock while it decodes and resizes; but where that is
    # quickly done (files of a few kB), passing the lock around costs more than a second thread brings.
    small = sum(file.size for file in files) < _SMALL_FILE * len(files)
    pool = ThreadPoolExecutor(1 if small else torch.get_num_threads())
    try:
        with tqdm(total=len(files), desc=progress, unit="image", disable=None if progress else True) as bar:
            for found in pool.map(decode_chunk, range(0, len(files), _CHUNK)):
                problems += found
                bar.update(min(_CHUNK, len(files) - bar.n))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not decode the rest
    if problems:
        _refuse(root, problems, size)
    return images


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Decode an opened image of any kind and return it in colour (3 channels) or grey (1)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
    if image.mode == _MODES[channels]:
        image.load()  # to convert it would copy it
        return image
    return image.convert(_MODES[channels])


def reason(error: Exception) -> str:
    """Say in a few words why an image cannot be read."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def _decode_file(path: Path, *, size: int, resize: bool, channels: int) -> Bytes:
    with Image.open(path) as image:
        if not resize and image.size != (size, size):
            raise _WrongSizeError(f"{image.width} x {image.height}")
        pixels = convert(image, channels)
    if resize:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(size, size, channels)


def _refuse(root: Path, problems: Sequence[tuple[ImageFile, Exception]], size: int) -> None:
    unreadable = [
        f"{file.name} ({reason(error)})" for file, error in problems if not isinstance(error, _WrongSizeError)
    ]
    if unreadable:
        named = ", ".join(unreadable[:_SHOWN]) + (", ..." if len(unreadable) > _SHOWN else "")
        count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
        raise UserError(f"dataset.root={root}: {count} cannot be read: {named}")
    file, error = problems[0]
    raise UserError(
        f"dataset.root={root}: {file.name} is {error}, but the first image is {size} x {size}; "
        "set dataset.image_size to bring all images to one size"
    )
