"""Handwritten digits that come with scikit-learn: real images, no download.

Images
------
The 1,797 grey 8 x 8 images of the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998. Every fifth image of a class (the 5th, 10th, ...) is a test image. That
gives 1,442 images to train on and 355 to test on.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import Contents, DataSource, ImageArray

RANK = 10
_TEST_EVERY = 5
_COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # images of each digit


def digits_source(options: DatasetConfig) -> DataSource:
    """Describe the digits, enlarged to ``options.image_size`` (None: 16), the grey value repeated to all channels.

    Examples
    --------
    >>> digits_source(DatasetConfig(name="digits")).image_size
    16
    """
    size = options.image_size or 16
    train = tuple(count - count // _TEST_EVERY for count in _COUNTS)
    test = tuple(count // _TEST_EVERY for count in _COUNTS)
    return DataSource(size, options.channels, train, test, load=partial(_load_digits, size, options.channels))


def _load_digits(size: int, channels: int) -> Contents:
    from sklearn.datasets import load_digits  # takes a second to import

    grey, targets = load_digits(return_X_y=True)
    coarse = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    # Pillow enlarges in integer arithmetic: the same bytes, and stage keys, on every machine.
    fine = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in coarse]
    images = torch.from_numpy(np.stack(fine)).unsqueeze(3).repeat(1, 1, 1, channels)
    labels = torch.from_numpy(targets.astype(np.int64))
    # The images are ordered by writer: every fifth image of a class takes some of every writer.
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(len(_COUNTS)):
        test[(labels == digit).nonzero().flatten()[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    sides = ImageArray(images[~test], labels[~test]), ImageArray(images[test], labels[test])
    return Contents(tuple("0123456789"), *sides)


SOURCES = {"digits": digits_source}
