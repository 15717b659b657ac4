"""Images in folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val`` instead of ``test``).

Images are decoded once; :mod:`rethink_prune.data.decode_cache` keeps the result.
"""

import io

from PIL import Image

from rethink_prune.config import DatasetConfig
from rethink_prune.data.decoding import describe_failure
from rethink_prune.data.listing import EXPECTED_FOLDERS, list_image_folder
from rethink_prune.data.source import Contents, DataSource, EncodedImages
from rethink_prune.errors import UserError

RANK = 40


def folder_source(options: DatasetConfig) -> DataSource:
    """List the folder ``options.root`` and check that it can be trained on; decodes nothing.

    With ``options.image_size=None``, the images' own size is kept: it is read from the first image's header, and all
    images must have it.

    Raises
    ------
    UserError
        As :func:`~rethink_prune.data.listing.list_image_folder` does; or the first image is not square and the size is
        None.
    """
    if options.root is None:
        raise UserError(f"dataset.root=null: give the folder of the images; {EXPECTED_FOLDERS}")
    classes, train, test = list_image_folder(options.root, decode_once=True)
    size = options.image_size or size_of_first(train)
    return DataSource.from_contents(Contents(classes, train, test), image_size=size, channels=options.channels)


def size_of_first(images: EncodedImages) -> int:
    """Return the width of the first image, read from its header; raise `UserError` if it is not square."""
    where, name = images.option, images.name(0)
    try:
        with Image.open(io.BytesIO(images.read(0).data)) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{where}: cannot read {name} ({describe_failure(error)})") from error
    if width != height:
        raise UserError(f"{where}: {name} is {width} x {height}; set dataset.image_size")
    return width


SOURCES = {"folder": folder_source}
