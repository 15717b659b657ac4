"""Handwritten digits that come with scikit-learn: real images, no download.

Images
------
The 1,797 grey 8 x 8 images of the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998. They are ordered by writer, so the split goes by position:
every fifth image of a class (the 5th, 10th, ...) is a test image. That gives 1,442 images to train on and 355
to test on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rethink_prune.data.source import Contents, Source, memory_pool
from rethink_prune.errors import UserError

_TEST_EVERY = 5
_COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # images of each digit


def digits_source(*, image_size: int | None, channels: int) -> Source:
    """Describe the digits, enlarged to `image_size` (None: 16) and repeated to `channels` (1 or 3)."""
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: digits come with 1 or 3 channels")
    size = 16 if image_size is None else image_size

    def read(cache_dir: Path, progress: bool) -> Contents:
        return _load(size, channels)

    return Source(
        image_size=size,
        channels=channels,
        train_counts=tuple(count - count // _TEST_EVERY for count in _COUNTS),
        test_counts=tuple(count // _TEST_EVERY for count in _COUNTS),
        open=read,
    )


def _load(size: int, channels: int) -> Contents:
    from sklearn.datasets import load_digits  # takes a second to import

    grey, targets = load_digits(return_X_y=True)
    coarse = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # Pillow enlarges in integer arithmetic: the same bytes, and stage keys, on every machine.
    fine = [Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR) for image in coarse]
    stacked = np.stack([np.asarray(image) for image in fine])
    images = torch.from_numpy(stacked).unsqueeze(3).repeat(1, 1, 1, channels)
    labels = torch.from_numpy(targets.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(len(_COUNTS)):
        test[(labels == digit).nonzero().flatten()[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return Contents(
        classes=tuple(str(digit) for digit in range(len(_COUNTS))),
        train=memory_pool(images[~test], labels[~test]),
        test=memory_pool(images[test], labels[test]),
    )
