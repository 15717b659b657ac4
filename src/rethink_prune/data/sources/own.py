"""A user's own data set: ``dataset.name=path.to.module:factory``.

The contract: ``factory(root=dataset.root, **dataset.args)`` returns a mapping with

- ``"train"`` and ``"test"``: each a pair of images (uint8, N x H x W x C, square, NumPy array or tensor) and labels
  (integers in [0, K), N), both with at least one image;
- ``"classes"``: the K >= 2 class names, in the order of the labels.

It is called whenever the data set is described or loaded, dry runs included. Where it takes long, the factory
should keep its result in a file. Results depend on the returned values alone, which the data set's
fingerprint covers.
"""

import inspect
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import Contents, DataSource, ImageArray
from rethink_prune.errors import UserError
from rethink_prune.imports import import_object
from rethink_prune.seeds import seeded


def own_source(options: DatasetConfig) -> DataSource:
    """Call the factory ``options.name`` and check what it returns against the contract above."""
    name = options.name
    where = f"dataset.name={name}"
    result = _call_factory(options, where)
    if not isinstance(result, Mapping) or not {"train", "test", "classes"} <= result.keys():
        raise UserError(f"{where}: must return a mapping with train, test and classes")
    if not isinstance(result["classes"], Sequence) or isinstance(result["classes"], str):
        raise UserError(f"{where}: classes must be a list of names, not {result['classes']!r}")
    # Names can be numbers: dataset.classes, and the fingerprint, hold text.
    classes = tuple(str(label) for label in result["classes"])
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"{where}: classes must be at least two different names, not {list(classes)}")
    train, test = (_check_side(result[side], f"{where}: {side}", len(classes)) for side in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [" x ".join(map(str, side.images.shape[1:])) for side in (train, test)]
        raise UserError(f"{where}: train images are {sizes[0]}, but test images are {sizes[1]}")
    _, height, width, depth = train.images.shape
    if height != width:
        raise UserError(f"{where}: images must be square, not {height} x {width}")
    if options.image_size not in (None, height):
        raise UserError(f"dataset.image_size={options.image_size}: {name} gives {height} x {width}; set it to null")
    if options.channels != depth:
        raise UserError(f"dataset.channels={options.channels}: {name} gives {depth}; set dataset.channels={depth}")
    return DataSource.from_contents(Contents(classes, train, test), image_size=height, channels=depth)


def _call_factory(options: DatasetConfig, where: str) -> object:
    factory = import_object(options.name, "dataset.name")
    try:
        # Asked apart from the call: a TypeError of the call can come from inside the factory as well.
        inspect.signature(factory).bind(root=options.root, **options.args)
    except TypeError as error:
        raise UserError(f"dataset.args={options.args}: {options.name} is called with these and root: {error}") from None
    try:
        # What it draws from global generators is the same for every study, whatever that study's seed is.
        with seeded(0):
            return factory(root=options.root, **options.args)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where}: failed with {reason} (HYDRA_FULL_ERROR=1 shows where)") from error


def _check_side(pair: object, where: str, num_classes: int) -> ImageArray:
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
    return ImageArray(torch.from_numpy(writable), torch.from_numpy(labels.astype(np.int64)))
