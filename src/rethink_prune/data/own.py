"""A user's own data set: ``dataset.name=path.to.module:factory``.

The contract: ``factory(root=dataset.root, **dataset.args)`` returns a mapping with

- ``"train"`` and ``"test"``: each a pair of images (uint8, N x H x W x C, square, NumPy array or tensor) and labels
  (integers in [0, K), N), both with at least one image;
- ``"classes"``: the K >= 2 class names, in the order of the labels.

It is called whenever the data set is described or loaded, dry runs included. Where it takes long, the factory
should keep its result in a file. Results depend on the returned values alone, which the data set's
fingerprint covers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rethink_prune.data.source import Contents, Source, memory_pool
from rethink_prune.data.split import Split
from rethink_prune.errors import UserError
from rethink_prune.imports import import_object


def own_source(
    name: str, *, root: str | None, image_size: int | None, channels: int, args: Mapping[str, Any] | None
) -> Source:
    """Call the factory `name` and check what it returns against the contract above."""
    factory = cast(Callable[..., object], import_object(name, "dataset.name"))
    arguments = dict(args or {})
    try:
        inspect.signature(factory).bind(root=root, **arguments)
    except TypeError as error:
        raise UserError(f"dataset.args={arguments}: {name} is called with these and root: {error}") from None
    where = f"dataset.name={name}"
    try:
        result = factory(root=root, **arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where}: failed with {reason} (HYDRA_FULL_ERROR=1 shows where)") from error
    if not isinstance(result, Mapping) or not {"train", "test", "classes"} <= result.keys():
        raise UserError(f"{where}: must return a mapping with train, test and classes")
    if not isinstance(result["classes"], Sequence) or isinstance(result["classes"], str):
        raise UserError(f"{where}: classes must be a list of names, not {result['classes']!r}")
    classes = tuple(str(label) for label in result["classes"])
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"{where}: classes must be at least two different names, not {list(classes)}")
    train = _check_split(result["train"], f"{where}: train", len(classes))
    test = _check_split(result["test"], f"{where}: test", len(classes))
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [" x ".join(map(str, split.images.shape[1:])) for split in (train, test)]
        raise UserError(f"{where}: train images are {sizes[0]}, but test images are {sizes[1]}")
    _, height, width, depth = train.images.shape
    if height != width:
        raise UserError(f"{where}: images must be square, not {height} x {width}")
    if image_size not in (None, height):
        raise UserError(f"dataset.image_size={image_size}: {name} gives {height} x {width}; set it to null")
    if channels != depth:
        raise UserError(f"dataset.channels={channels}: {name} gives {depth}; set dataset.channels={depth}")

    def read(cache_dir: Path, progress: bool) -> Contents:
        return Contents(classes, memory_pool(train.images, train.labels), memory_pool(test.images, test.labels))

    return Source(
        image_size=height,
        channels=depth,
        train_counts=tuple(torch.bincount(train.labels, minlength=len(classes)).tolist()),
        test_counts=tuple(torch.bincount(test.labels, minlength=len(classes)).tolist()),
        open=read,
    )


def _check_split(pair: object, where: str, num_classes: int) -> Split:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UserError(f"{where}: must be a pair of images and labels")
    try:
        images, labels = (np.asarray(part.detach() if isinstance(part, torch.Tensor) else part) for part in pair)
    except ValueError:
        raise UserError(f"{where}: images must all have one shape") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{where}: images must be uint8, N x H x W x C, not {images.dtype} of shape {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(f"{where}: labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}")
    if not images.size:
        raise UserError(f"{where}: has no images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{where}: labels must be in [0, {num_classes}), not up to {labels.max()}")
    # Torch wants memory it may write to, even where nobody does.
    writable = np.require(images, requirements=["C", "W"])
    return Split(torch.from_numpy(writable), torch.from_numpy(labels.astype(np.int64)))
