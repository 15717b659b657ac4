"""ImageNet (ILSVRC 2012): its sizes, enough to plan a study.

References
----------
O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, arXiv:1409.0575.
"""

from __future__ import annotations

from pathlib import Path

from rethink_prune.data.source import Contents, Source
from rethink_prune.errors import UserError

_CLASSES = 1000
_TRAIN_IMAGES, _VALIDATION_IMAGES = 1_281_167, 50_000


def imagenet_source(*, image_size: int | None, channels: int) -> Source:
    """Describe ImageNet at `image_size` (None: 224); the validation images are those to test on."""
    if channels != 3:
        raise UserError(f"dataset.channels={channels}: imagenet images have 3 channels")

    def read(cache_dir: Path, progress: bool) -> Contents:
        raise UserError("dataset.name=imagenet: training on ImageNet is not available yet; dry_run=true plans it")

    # The classes have 732 to 1,300 training images each. A plan needs their sum only, so they are evened out here.
    each, more = divmod(_TRAIN_IMAGES, _CLASSES)
    return Source(
        image_size=224 if image_size is None else image_size,
        channels=3,
        train_counts=(each + 1,) * more + (each,) * (_CLASSES - more),
        test_counts=(_VALIDATION_IMAGES // _CLASSES,) * _CLASSES,
        open=read,
    )
