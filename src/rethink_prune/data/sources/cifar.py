"""CIFAR-10 and CIFAR-100 through torchvision, which downloads and verifies them.

References
----------
A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import http.client
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import Contents, DataSource, ImageArray
from rethink_prune.errors import UserError

RANK = 20
_NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
_TRAIN_IMAGES, _TEST_IMAGES = 50_000, 10_000
# The paper's code uses these for both sets, although CIFAR-100's own mean differs.
_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def cifar_source(options: DatasetConfig) -> DataSource:
    """Describe CIFAR-10 or CIFAR-100, kept under ``options.root`` (``datasets`` in the current folder if None).

    Examples
    --------
    >>> len(cifar_source(DatasetConfig(name="cifar100")).train_counts)
    100
    """
    name = options.name
    if options.image_size not in (None, 32):
        raise UserError(f"dataset.image_size={options.image_size}: {name} images are 32 x 32; give 32 or null")
    if options.channels != 3:
        raise UserError(f"dataset.channels={options.channels}: {name} images have 3 channels")
    classes, root = _NUM_CLASSES[name], Path(options.root or "datasets").expanduser().absolute()
    train, test = ((images // classes,) * classes for images in (_TRAIN_IMAGES, _TEST_IMAGES))
    return DataSource(32, 3, train, test, load=partial(_load_cifar, name, root))


def _load_cifar(name: str, root: Path) -> Contents:
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds to import, and digits do without

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        train = dataset(root, train=True)
    except RuntimeError:  # not there, or not what it should be
        _download(dataset, name, root)
        train = dataset(root, train=True)
    classes, train_images = tuple(train.classes), _to_array(train)
    del train  # it holds its images once more, 150 MB
    return Contents(classes, train_images, _to_array(dataset(root, train=False)), _STATISTICS)


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


def _to_array(dataset: Any) -> ImageArray:
    images = torch.from_numpy(np.ascontiguousarray(dataset.data))
    return ImageArray(images, torch.tensor(dataset.targets, dtype=torch.int64))


SOURCES = {name: cifar_source for name in _NUM_CLASSES}
