"""Describe and load a data set by name: subsets, statistics and a fingerprint over what every kind offers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rethink_prune.data.cifar import cifar_source
from rethink_prune.data.digits import digits_source
from rethink_prune.data.folder import folder_source
from rethink_prune.data.imagenet import imagenet_source
from rethink_prune.data.memory import available_memory
from rethink_prune.data.own import own_source
from rethink_prune.data.source import Contents, ListedContents, Source, Statistics
from rethink_prune.data.split import Files, Split
from rethink_prune.data.subsets import Positions, Subsets
from rethink_prune.errors import UserError

_GIB = 2**30
_PIXELS_AT_ONCE = 2**20  # counting takes 8 bytes for each of them


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
    train, validation, test : Split or Files
        Images in memory or in files, all three alike, and labels, after hold-out and limits; validation is None without
        a hold-out.
    classes : tuple of str
        Class names in the order of the labels.
    mean, std : tuple of float
        Per channel, on the [0, 1] scale.
    fingerprint : str
        SHA-256 in hexadecimal of everything above but the name: where the images came from does not count. Images in
        files count by the classes, how many files each has, and which of them are used; their size counts, too.
    """

    name: str
    train: Split | Files
    validation: Split | Files | None
    test: Split | Files
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


def describe_dataset(
    name: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
    train_limit: int | None = None,
    test_limit: int | None = None,
    validation: float = 0.0,
    split_seed: int = 0,
    args: Mapping[str, Any] | None = None,
) -> DatasetInfo:
    """Count what :func:`load_dataset` would load, decoding no image.

    ``digits``, the CIFAR sets and ImageNet are known beforehand and need no files; ImageNet is listed if it is there;
    a folder is listed and one image's header is read where `image_size` is None; a user's own factory is called.

    Parameters
    ----------
    name : {"digits", "cifar10", "cifar100", "imagenet", "folder"} or str
        Or ``path.to.module:factory``, see :mod:`rethink_prune.data.own`.
    root : str, optional
        Where the images are, or for CIFAR (default ``datasets``) are downloaded to; digits need none.
    image_size : int, optional
        Height and width in pixels that images are brought to; None keeps them (digits: 16, ImageNet: 224).
    channels : int
        3 for colour, 1 for grey.
    train_limit, test_limit : int, optional
        Use a class-balanced subset of so many images.
    validation : float
        Fraction of each class's training images that is held out, before `train_limit`; in [0, 1).
    split_seed : int
        Decides which images are held out or taken.
    args : mapping, optional
        Further arguments of a user's own factory.

    Raises
    ------
    UserError
        An option does not fit the data set, or its files are not where and as they should be.
    """
    source = _find_source(name, root=root, image_size=image_size, channels=channels, args=args)
    subsets = Subsets(validation, train_limit, test_limit, split_seed)
    counts = subsets.count(source.train_counts, source.test_counts)
    return DatasetInfo(
        name=name,
        num_classes=len(source.train_counts),
        train_images=sum(counts.train),
        validation_images=sum(counts.validation),
        test_images=sum(counts.test),
        channels=source.channels,
        image_size=source.image_size,
    )


def load_dataset(
    name: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    channels: int = 3,
    train_limit: int | None = None,
    test_limit: int | None = None,
    validation: float = 0.0,
    split_seed: int = 0,
    args: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cache_dir: Path,
    progress: bool = True,
) -> ImageDataset:
    """Load a data set into memory, or list the files of one that is streamed (ImageNet).

    Parameters
    ----------
    name, root, image_size, channels, train_limit, test_limit, validation, split_seed, args
        As for :func:`describe_dataset`.
    mean, std : sequence of float, optional
        Per channel on the [0, 1] scale; by default the paper's for CIFAR, and otherwise those of the training
        images.
    cache_dir : Path
        Where the decoded images of a folder are kept.
    progress : bool
        Show a progress bar while decoding, if the output is a terminal.

    Raises
    ------
    UserError
        As for :func:`describe_dataset`; also images that cannot be read, or do not fit in memory.
    """
    source = _find_source(name, root=root, image_size=image_size, channels=channels, args=args)
    _check_statistics(mean, std, source.channels)
    contents = source.open(cache_dir, progress)
    subsets = Subsets(validation, train_limit, test_limit, split_seed)
    chosen = subsets.choose(contents.train.labels, contents.test.labels, len(contents.classes))
    if isinstance(contents, ListedContents):
        final_mean, final_std = _choose_statistics(mean, std, contents.statistics)
        return ImageDataset(
            name=name,
            train=contents.train.take(chosen.train),
            validation=contents.train.take(chosen.validation) if len(chosen.validation) else None,
            test=contents.test.take(chosen.test),
            classes=contents.classes,
            mean=final_mean,
            std=final_std,
            fingerprint=_listed_fingerprint(source, contents.classes, chosen, final_mean, final_std),
        )
    train, held_out, test = _read_splits(contents, chosen, source)
    final_mean, final_std = _choose_statistics(mean, std, contents.statistics or channel_statistics(train.images))
    if not all(final_std):
        raise UserError(f"dataset.name={name}: a channel is the same in all training images; set dataset.std")
    return ImageDataset(
        name=name,
        train=train,
        validation=held_out,
        test=test,
        classes=contents.classes,
        mean=final_mean,
        std=final_std,
        fingerprint=_fingerprint([train, held_out, test], contents.classes, final_mean, final_std),
    )


def _read_splits(contents: Contents, chosen: Positions, source: Source) -> tuple[Split, Split | None, Split]:
    """Read train, validation and test into memory."""
    # Read in the data set's order, so that decoded images can be kept for other hold-outs as well.
    used = torch.cat([chosen.train, chosen.validation]).sort().values
    if not contents.in_memory:
        # Setting held-out images apart takes a second copy for a moment.
        most = len(used) * (2 if len(chosen.validation) else 1) + len(chosen.test)
        _check_memory(most, image_size=source.image_size, channels=source.channels)
    labels = contents.train.labels
    images = contents.train.read(used)
    held_out = None
    if len(chosen.validation):
        held_out = Split(images[torch.searchsorted(used, chosen.validation)], labels[chosen.validation])
        images = images[torch.searchsorted(used, chosen.train)]
    train = Split(images, labels[chosen.train])
    return train, held_out, Split(contents.test.read(chosen.test), contents.test.labels[chosen.test])


def _choose_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, default: Statistics) -> Statistics:
    default_mean, default_std = default
    return (
        default_mean if mean is None else tuple(map(float, mean)),
        default_std if std is None else tuple(map(float, std)),
    )


def _find_source(
    name: str,
    *,
    root: str | None,
    image_size: int | None,
    channels: int,
    args: Mapping[str, Any] | None,
) -> Source:
    if image_size is not None and image_size < 1:
        raise UserError(f"dataset.image_size={image_size}: must be at least 1")
    if ":" in name:
        return own_source(name, root=root, image_size=image_size, channels=channels, args=args)
    if args:
        raise UserError(f"dataset.args={dict(args)}: only dataset.name=path.to.module:factory takes arguments")
    match name:
        case "digits":
            return digits_source(image_size=image_size, channels=channels)
        case "cifar10" | "cifar100":
            return cifar_source(name, root=root, image_size=image_size, channels=channels)
        case "imagenet":
            return imagenet_source(root=root, image_size=image_size, channels=channels)
        case "folder":
            return folder_source(root=root, image_size=image_size, channels=channels)
    raise UserError(
        f"dataset.name={name}: unknown; choose digits, cifar10, cifar100, imagenet, folder or path.to.module:factory"
    )


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    for option, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise UserError(f"dataset.{option}={list(values)}: needs {channels} values, one per channel")
    if std is not None and min(std) <= 0:
        raise UserError(f"dataset.std={list(std)}: must be positive")


def _check_memory(images: int, *, image_size: int, channels: int) -> None:
    available = available_memory()
    needed = images * image_size**2 * channels
    if available is not None and needed > available:
        raise UserError(
            f"dataset: {images} images of {image_size} x {image_size} x {channels} need {needed / _GIB:.2f} "
            f"GiB of memory, {available / _GIB:.2f} GiB are available; set a smaller dataset.image_size or "
            "dataset.train_limit"
        )


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images (N x H x W x C), on the [0, 1] scale.

    Counted in whole numbers, so the result depends neither on the order of the images nor on the machine.
    """
    pixels = images.flatten(0, 2).numpy()
    counts = np.zeros((pixels.shape[1], 256), dtype=np.int64)
    for start in range(0, len(pixels), _PIXELS_AT_ONCE):
        for channel, values in enumerate(pixels[start : start + _PIXELS_AT_ONCE].T):
            counts[channel] += np.bincount(values, minlength=256)
    number, values = len(pixels), np.arange(256)
    totals, squares = (counts @ values).tolist(), (counts @ values**2).tolist()
    # Python's integers, which do not overflow where these products do.
    deviations = [math.sqrt(number * s - t * t) for t, s in zip(totals, squares, strict=True)]
    return tuple(t / (255 * number) for t in totals), tuple(d / (255 * number) for d in deviations)


def _fingerprint(
    splits: Sequence[Split | None], classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> str:
    shapes = [None if split is None else list(split.images.shape) for split in splits]
    header = {"shapes": shapes, "classes": list(classes), "mean": list(mean), "std": list(std)}
    digest = hashlib.sha256(json.dumps(header).encode())
    for split in splits:
        if split is not None:
            digest.update(split.images.numpy().data)
            digest.update(split.labels.numpy().astype("<i8").data)
    return digest.hexdigest()


def _listed_fingerprint(
    source: Source, classes: Sequence[str], chosen: Positions, mean: Sequence[float], std: Sequence[float]
) -> str:
    counts = [source.train_counts, source.test_counts]
    header = {"counts": counts, "classes": classes, "size": source.image_size, "mean": mean, "std": std}
    digest = hashlib.sha256(json.dumps(header).encode())
    for positions in chosen:
        digest.update(f"{len(positions)}:".encode())
        digest.update(positions.numpy().astype("<i8").data)
    return digest.hexdigest()
