"""CIFAR-10 and CIFAR-100 through torchvision, which downloads and verifies them.

References
----------
A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import http.client
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from rethink_prune.data.source import Contents, Pool, Source, memory_pool
from rethink_prune.errors import UserError

_NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
_TRAIN_IMAGES, _TEST_IMAGES = 50_000, 10_000
# Those of the paper's code, for both sets.
_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2023, 0.1994, 0.2010)


def cifar_source(name: str, *, root: str | None, image_size: int | None, channels: int) -> Source:
    """Describe ``"cifar10"`` or ``"cifar100"``, kept under `root` (``datasets`` here if None)."""
    if image_size not in (None, 32):
        raise UserError(f"dataset.image_size={image_size}: {name} images are 32 x 32; give 32 or null")
    if channels != 3:
        raise UserError(f"dataset.channels={channels}: {name} images have 3 channels")
    classes = _NUM_CLASSES[name]
    folder = Path(root or "datasets").expanduser().absolute()

    def read(cache_dir: Path, progress: bool) -> Contents:
        return _load(name, folder)

    return Source(
        image_size=32,
        channels=3,
        train_counts=(_TRAIN_IMAGES // classes,) * classes,
        test_counts=(_TEST_IMAGES // classes,) * classes,
        open=read,
    )


def _load(name: str, root: Path) -> Contents:
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds to import, and digits do without

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        train = dataset(root, train=True)
    except RuntimeError:  # not there, or not what it should be
        _download(dataset, name, root)
        train = dataset(root, train=True)
    classes = tuple(train.classes)
    train_pool = _pool(train)
    del train  # the two sides are big enough not to keep twice
    return Contents(classes, train_pool, _pool(dataset(root, train=False)), (_MEAN, _STD))


def _download(dataset: Any, name: str, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # runs of one sweep start together
            dataset(root, train=True, download=True)
    except (OSError, RuntimeError, tarfile.TarError, EOFError, http.client.HTTPException) as error:
        raise UserError(
            f"dataset.name={name}: could not be downloaded ({error}); put {dataset.filename} "
            f"(md5 {dataset.tgz_md5}, from {dataset.url}) into {root}"
        ) from error


def _pool(dataset: Any) -> Pool:
    images = torch.from_numpy(np.ascontiguousarray(dataset.data))
    return memory_pool(images, torch.tensor(dataset.targets, dtype=torch.int64))
