"""ImageNet (ILSVRC 2012), or a part of it: ``root/train/<wnid>/*`` and ``root/val/<wnid>/*``.

Images stay in their files and are decoded in every epoch (:mod:`rethink_prune.data.streamed_images`). Classes are the
folders' names, sorted; the validation images are those to test on. Without its folder, the sizes of the whole set are
known, which is enough to plan a study.

References
----------
O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, arXiv:1409.0575.
"""

from functools import partial
from pathlib import Path

from rethink_prune.config import DatasetConfig
from rethink_prune.data.listing import list_image_folder
from rethink_prune.data.source import Contents, DataSource
from rethink_prune.errors import UserError

RANK = 30
# The values that the field uses: of the training images.
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSES = 1000
_TRAIN_IMAGES, _VALIDATION_IMAGES = 1_281_167, 50_000


def imagenet_source(options: DatasetConfig) -> DataSource:
    """Describe ImageNet: as listed under ``options.root``, or as published if that is not there.

    Loading raises `UserError` if the root is not there.

    Examples
    --------
    >>> sum(imagenet_source(DatasetConfig(name="imagenet")).train_counts)
    1281167
    """
    if options.channels != 3:
        raise UserError(f"dataset.channels={options.channels}: imagenet images have 3 channels")
    size = options.image_size or 224
    root = options.root
    if root is not None and Path(root).expanduser().exists():
        contents = Contents(*list_image_folder(root, decode_once=False), STATISTICS)
        return DataSource.from_contents(contents, image_size=size, channels=3)
    # The classes have 732 to 1,300 training images each. A plan needs their sum only, so they are evened out here.
    each, more = divmod(_TRAIN_IMAGES, _CLASSES)
    train = (each + 1,) * more + (each,) * (_CLASSES - more)
    test = (_VALIDATION_IMAGES // _CLASSES,) * _CLASSES
    return DataSource(size, 3, train, test, load=partial(_refuse_without_folder, root))


def _refuse_without_folder(root: str | None) -> Contents:
    where = "null: give the folder that holds"
    if root is not None:
        where = f"{Path(root).expanduser().absolute()}: no such folder; it should hold"
    raise UserError(
        f"dataset.root={where} train/<wnid>/* and val/<wnid>/*; "
        "scripts/prepare_imagenet.py makes it from the official archives"
    )


SOURCES = {"imagenet": imagenet_source}
