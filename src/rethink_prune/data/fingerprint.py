"""A digest of what a data set gives to a training. Stage keys contain it: a changed digest would retrain everything."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from rethink_prune.data.images import ImageArray
from rethink_prune.data.source import DataSource, Statistics
from rethink_prune.data.subsets import Subsets


def fingerprint_arrays(parts: Sequence[ImageArray | None], classes: Sequence[str], statistics: Statistics) -> str:
    """Return the SHA-256 of images and labels (train, validation, test), classes, mean and standard deviation.

    Examples
    --------
    >>> array = ImageArray(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]))
    >>> fingerprint_arrays([array, None, array], ["a", "b"], ((0.5,), (0.5,)))[:12]
    '7f998e0041a7'
    """
    shapes = [None if part is None else list(part.images.shape) for part in parts]
    used = [part for part in parts if part is not None]
    blocks = [block for part in used for block in (part.images.numpy().data, _label_bytes(part.labels))]
    return _hash_all({"shapes": shapes, "classes": classes}, statistics, blocks)


def fingerprint_files(
    source: DataSource, chosen: Subsets[torch.Tensor], classes: Sequence[str], statistics: Statistics
) -> str:
    """Return the SHA-256 of what is listed: classes, how many files each has, which are used, and at which size.

    Where the files are does not count, nor what is in them.
    """
    # Reading a million files would take as long as an epoch.
    header = {"counts": [source.train_counts, source.test_counts], "classes": classes, "size": source.image_size}
    blocks = [block for part in chosen for block in (f"{len(part)}:".encode(), _label_bytes(part))]
    return _hash_all(header, statistics, blocks)


def _hash_all(header: dict[str, Any], statistics: Statistics, blocks: Sequence[bytes | memoryview]) -> str:
    mean, std = statistics
    digest = hashlib.sha256(json.dumps({**header, "mean": mean, "std": std}).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _label_bytes(values: torch.Tensor) -> bytes | memoryview:
    return values.numpy().astype("<i8").data  # the same bytes on machines of either byte order
