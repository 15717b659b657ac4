"""Decode images into one array of bytes, and keep the array in a file."""

import hashlib
import json
import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from rethink_prune.config import DatasetConfig
from rethink_prune.data.decoding import Pixels, WrongSizeError, describe_failure, read_square
from rethink_prune.data.source import EncodedImages, ImageArray
from rethink_prune.errors import UserError

_log = logging.getLogger(__name__)

_CHUNK = 64  # files per task: one by one, handing over the tasks takes as long as decoding 32 x 32 pixels
_SMALL_FILE = 4096  # bytes; about 64 x 64 pixels of JPEG
_SHOWN = 10  # files named in an error


def decode_cached(
    files: EncodedImages, options: DatasetConfig, *, size: int, cache_dir: Path, progress: bool
) -> ImageArray:
    """Return the images of `files`, decoded now or at an earlier time.

    The result is kept in `cache_dir` under a name made of the path and version of every image and of how they were
    decoded, so a changed folder is decoded anew. Older results stay until somebody deletes them.

    Parameters
    ----------
    files : EncodedImages
        What to decode, in this order; with versions.
    options : DatasetConfig
        Says how many channels; and with ``image_size=None`` that all images must have the same size.
    size : int
        Height and width of the result, in pixels.
    cache_dir : Path
        Where results are kept.
    progress : bool
        Draw a progress bar, if the output is a terminal.

    Raises
    ------
    UserError
        Images cannot be read or have the wrong size (then nothing is kept), or the result cannot be written.
    """
    resize = options.image_size is not None
    shape = (len(files), size, size, options.channels)
    entry = cache_dir / f"{_cache_key(files, size, resize, options.channels)}.npz"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # One of several runs that start together decodes, the others wait and read.
        with FileLock(entry.with_suffix(".lock")):
            images = _read_entry(entry, shape)
            if images is None:
                images = _decode_files(files, np.empty(shape, dtype=np.uint8), resize, progress)
                _write_entry(entry, images)
    except OSError as error:
        raise UserError(f"{cache_dir}: cannot keep the decoded images here ({error})") from error
    return ImageArray(torch.from_numpy(images), files.labels)


def _cache_key(files: EncodedImages, size: int, resize: bool, channels: int) -> str:
    versions = [] if files.versions is None else files.versions.tolist()
    listed = [[files.name(i), *version] for i, version in enumerate(versions)]
    made_of = [str(files.root), size, resize, channels, listed]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _read_entry(entry: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Return a kept array, or None if there is none or it is damaged; its checksum is verified in reading."""
    try:
        with np.load(entry, allow_pickle=False) as archive:
            images: Pixels = archive["images"]
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"holds {images.dtype} of shape {images.shape}")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged (%s): decoding the images again", entry, error)
        return None
    return images


def _write_entry(entry: Path, images: Pixels) -> None:
    partial = entry.with_suffix(".partial")  # the lock's holder is its only writer
    with partial.open("wb") as file:
        np.savez(file, images=images)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a crash must not leave a file that looks complete
    partial.replace(entry)


def _decode_files(files: EncodedImages, images: Pixels, resize: bool, progress: bool) -> Pixels:
    """Decode all files into `images` (uint8, N x H x W x C) and return it."""
    _, size, _, channels = images.shape

    def decode_chunk(start: int) -> list[tuple[str, Exception]]:
        failures: list[tuple[str, Exception]] = []
        for i in range(start, min(start + _CHUNK, len(files))):
            try:
                images[i] = read_square(files.read(i), size, resize=resize, channels=channels)
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                failures.append((files.name(i), error))
        return failures

    failures = []
    # Threads are enough: Pillow releases the interpreter's lock while it decodes and resizes. For files of a few kB,
    # passing the lock around costs more than a second thread brings.
    small = files.versions is not None and files.versions[:, 0].mean() < _SMALL_FILE
    label = f"decoding {files.name(0).partition('/')[0]}"
    pool = ThreadPoolExecutor(1 if small else torch.get_num_threads())
    try:
        with tqdm(total=len(files), desc=label, unit="image", disable=None if progress else True) as bar:
            for found in pool.map(decode_chunk, range(0, len(files), _CHUNK)):
                failures += found
                bar.update(min(_CHUNK, len(files) - bar.n))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not decode the rest
    if failures:
        _refuse_images(files.option, failures, size)
    return images


def _refuse_images(option: str, failures: list[tuple[str, Exception]], size: int) -> None:
    unreadable = [f"{name} ({describe_failure(e)})" for name, e in failures if not isinstance(e, WrongSizeError)]
    # First what no option can repair.
    if unreadable:
        named = ", ".join(unreadable[:_SHOWN]) + (", ..." if len(unreadable) > _SHOWN else "")
        count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
        raise UserError(f"{option}: {count} cannot be read: {named}")
    name, error = failures[0]
    raise UserError(
        f"{option}: {name} is {error}, but the first image is {size} x {size}; "
        "set dataset.image_size to bring all images to one size"
    )
