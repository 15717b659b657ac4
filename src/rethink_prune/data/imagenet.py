"""ImageNet (ILSVRC 2012), or a part of it: ``root/train/<wnid>/*`` and ``root/val/<wnid>/*``.

Images stay in their files and are decoded anew in every epoch (:mod:`rethink_prune.data.streaming`). Classes are the
folders' names, sorted; the validation images are those to test on. Without its folder, the sizes of the whole set are
known, which is enough to plan a study.

References
----------
O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, arXiv:1409.0575.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from rethink_prune.data.folder import find_classes, list_images
from rethink_prune.data.source import ListedContents, Source
from rethink_prune.data.split import Files
from rethink_prune.errors import UserError

IMAGE_SIZE = 224
# The field's, of the training images.
_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSES = 1000
_TRAIN_IMAGES, _VALIDATION_IMAGES = 1_281_167, 50_000
_HOW = "scripts/prepare_imagenet.py makes it from the official archives"


def imagenet_source(*, root: str | None, image_size: int | None, channels: int) -> Source:
    """Describe ImageNet at `image_size` (None: 224): as listed under `root`, or as published if that is not there.

    Raises
    ------
    UserError
        The channels are not 3, or `root` is there but not as it should be; once opened, also if it is not there.
    """
    if channels != 3:
        raise UserError(f"dataset.channels={channels}: imagenet images have 3 channels")
    size = IMAGE_SIZE if image_size is None else image_size
    folder = None if root is None else Path(root).expanduser().absolute()
    if folder is None or not folder.exists():
        return _published(size, folder)
    try:
        test_name, classes = find_classes(folder)
        train, test = (_list_side(folder, side, classes) for side in ("train", test_name))
    except OSError as error:  # no permission, or a link to nowhere
        raise UserError(f"dataset.root={root}: cannot be listed ({error})") from error

    def read(cache_dir: Path, progress: bool) -> ListedContents:
        return ListedContents(tuple(classes), train, test, _STATISTICS)

    train_counts, test_counts = (torch.bincount(side.labels).tolist() for side in (train, test))
    return Source(size, 3, tuple(train_counts), tuple(test_counts), open=read)


def _published(size: int, folder: Path | None) -> Source:
    def read(cache_dir: Path, progress: bool) -> ListedContents:
        where = "null: give the folder that holds" if folder is None else f"{folder}: no such folder; it should hold"
        raise UserError(f"dataset.root={where} train/<wnid>/* and val/<wnid>/*; {_HOW}")

    # The classes have 732 to 1,300 training images each. A plan needs their sum only, so they are evened out here.
    each, more = divmod(_TRAIN_IMAGES, _CLASSES)
    return Source(
        image_size=size,
        channels=3,
        train_counts=(each + 1,) * more + (each,) * (_CLASSES - more),
        test_counts=(_VALIDATION_IMAGES // _CLASSES,) * _CLASSES,
        open=read,
    )


def _list_side(root: Path, side: str, classes: list[str]) -> Files:
    names: list[bytes] = []
    counts = []
    for name in classes:
        found = list_images(root, side, name)
        names += [os.fsencode(f"{side}/{name}/{entry.name}") for entry in found]
        counts.append(len(found))
    return Files(root, np.array(names), torch.arange(len(classes)).repeat_interleave(torch.tensor(counts)))
