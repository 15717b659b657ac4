"""Describe and load a data set by name: its subsets, statistics and fingerprint."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data.decode_cache import decode_cached
from rethink_prune.data.memory import check_memory
from rethink_prune.data.normalization import channel_statistics
from rethink_prune.data.source import AnyImages, Contents, DataSource, EncodedImages, ImageArray, Statistics
from rethink_prune.data.sources import find_source
from rethink_prune.data.subsets import Subsets, choose_subsets, count_subsets
from rethink_prune.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """What a plan needs to know, found without decoding an image.

    Attributes
    ----------
    name : str
        As given.
    num_classes : int
        Number of classes.
    train_images, validation_images, test_images : int
        Images used, after hold-out and limits.
    channels : int
        Channels of an image.
    image_size : int
        Height and width in pixels.
    """

    name: str
    num_classes: int
    train_images: int
    validation_images: int
    test_images: int
    channels: int
    image_size: int


@dataclass(frozen=True)
class ImageDataset:
    """A data set as studies use it.

    Attributes
    ----------
    name : str
        As given.
    train, validation, test : AnyImages
        All three alike, after hold-out and limits; validation is None without a hold-out.
    classes : tuple of str
        Class names in the order of the labels.
    mean, std : tuple of float
        Per channel, on the [0, 1] scale.
    image_size : int
        Height and width in pixels.
    fingerprint : str
        SHA-256 in hexadecimal of everything above but the name: where the images came from does not count. Images
        that are decoded in every epoch count by the classes, how many images each has, and which of them are used;
        those of ``huggingface`` also by their content.
    """

    name: str
    train: AnyImages
    validation: AnyImages | None
    test: AnyImages
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    fingerprint: str


def describe_dataset(options: DatasetConfig) -> DatasetInfo:
    """Count what :func:`load_dataset` would load, decoding no image.

    ``digits``, the CIFAR sets and ImageNet are known beforehand and need no files; ImageNet is listed if it is there;
    a folder is listed and one image's header is read where ``image_size`` is None; a user's own factory is called; a
    set of the Hugging Face Hub is downloaded.

    Raises
    ------
    UserError
        An option does not fit the data set, or its files are not where and as they should be.

    Examples
    --------
    >>> describe_dataset(DatasetConfig(name="cifar10", validation=0.1)).train_images
    45000
    """
    source = find_source(options)
    counts = count_subsets(options, source.train_counts, source.test_counts)
    train, validation, test = map(sum, counts)
    return DatasetInfo(
        options.name, len(source.train_counts), train, validation, test, source.channels, source.image_size
    )


def load_dataset(options: DatasetConfig, *, cache_dir: Path, progress: bool = True) -> ImageDataset:
    """Load a data set into memory, or list the images of one that is decoded in every epoch (ImageNet).

    Parameters
    ----------
    options : DatasetConfig
        Which images.
    cache_dir : Path
        Where decoded images, and digests of images that are not, are kept.
    progress : bool
        Show a progress bar while decoding, if the output is a terminal.

    Raises
    ------
    UserError
        As for :func:`describe_dataset`; also images that cannot be downloaded or read, or do not fit in memory.

    Examples
    --------
    >>> dataset = load_dataset(DatasetConfig(name="digits", train_limit=100), cache_dir=Path("cache"))
    >>> dataset.train.images.shape
    torch.Size([100, 16, 16, 3])
    """
    source = find_source(options)
    contents = source.load()
    chosen = choose_subsets(options, contents.train.labels, contents.test.labels, len(contents.classes))
    # Train and validation are decoded together, in the data set's order: another hold-out then finds the same cache.
    used = torch.cat([chosen.train, chosen.validation]).sort().values
    both, test = contents.train.take(used), contents.test.take(chosen.test)
    if isinstance(both, EncodedImages) and isinstance(test, EncodedImages) and both.versions is not None:
        # Setting held-out images apart takes a second copy for a moment.
        most = len(used) * (2 if len(chosen.validation) else 1) + len(chosen.test)
        check_memory(most, image_size=source.image_size, channels=source.channels)
        decode = partial(decode_cached, options=options, size=source.image_size, cache_dir=cache_dir, progress=progress)
        both, test = decode(both), decode(test)
    train = both.take(torch.searchsorted(used, chosen.train))
    validation = both.take(torch.searchsorted(used, chosen.validation)) if len(chosen.validation) else None
    statistics = _find_statistics(options, contents, train)
    if isinstance(train, EncodedImages):
        sides = [side for side in (contents.train, contents.test) if isinstance(side, EncodedImages)]
        digests = [digest for side in sides if (digest := side.digest(cache_dir, progress=progress))]
        fingerprint = _fingerprint_encoded(source, chosen, contents.classes, statistics, digests)
    else:
        arrays = [part for part in (train, validation, test) if not isinstance(part, EncodedImages)]
        fingerprint = _fingerprint_arrays(arrays, contents.classes, statistics)
    return ImageDataset(
        options.name, train, validation, test, contents.classes, *statistics, source.image_size, fingerprint
    )


def _find_statistics(options: DatasetConfig, contents: Contents, train: AnyImages) -> Statistics:
    if options.mean is not None and options.std is not None:
        return options.mean, options.std
    if contents.statistics is not None:
        return contents.statistics
    if isinstance(train, EncodedImages):
        raise UserError(f"dataset.name={options.name}: has no fixed mean and std; set dataset.mean and dataset.std")
    # Of the training images alone: those to test on must not influence a network.
    mean, std = channel_statistics(train.images)
    if not all(std):
        raise UserError(f"dataset.name={options.name}: a channel is the same in all training images; set dataset.std")
    return mean, std


def _fingerprint_arrays(parts: Sequence[ImageArray | None], classes: Sequence[str], statistics: Statistics) -> str:
    """Return the SHA-256 of images and labels (train, validation, test), classes, mean and standard deviation.

    Examples
    --------
    >>> array = ImageArray(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]))
    >>> _fingerprint_arrays([array, None, array], ["a", "b"], ((0.5,), (0.5,)))[:12]
    '7f998e0041a7'
    """
    shapes = [None if part is None else list(part.images.shape) for part in parts]
    used = [part for part in parts if part is not None]
    blocks = [block for part in used for block in (part.images.numpy().data, _label_bytes(part.labels))]
    return _hash_all({"shapes": shapes, "classes": classes}, statistics, blocks)


def _fingerprint_encoded(
    source: DataSource,
    chosen: Subsets[torch.Tensor],
    classes: Sequence[str],
    statistics: Statistics,
    digests: Sequence[str],
) -> str:
    """Return the SHA-256 of what is listed: classes, how many images each has, which are used, and at which size.

    Where the images are does not count; what is in them counts by `digests`, of which files have none.
    """
    counts = [source.train_counts, source.test_counts]
    header = {"counts": counts, "classes": classes, "size": source.image_size}
    header |= {"content": digests} if digests else {}
    blocks = [block for part in chosen for block in (f"{len(part)}:".encode(), _label_bytes(part))]
    return _hash_all(header, statistics, blocks)


def _hash_all(header: dict[str, Any], statistics: Statistics, blocks: Sequence[bytes | memoryview]) -> str:
    # Stage keys contain the digest: a changed one would retrain everything.
    mean, std = statistics
    digest = hashlib.sha256(json.dumps({**header, "mean": mean, "std": std}).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _label_bytes(values: torch.Tensor) -> bytes | memoryview:
    return values.numpy().astype("<i8").data  # the same bytes on machines of either byte order
