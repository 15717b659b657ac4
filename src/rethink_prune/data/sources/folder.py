"""Images in folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val`` instead of ``test``).

Images are decoded once; :mod:`rethink_prune.data.decode_cache` keeps the result.
"""

from PIL import Image

from rethink_prune.config import DatasetConfig
from rethink_prune.data.listing import EXPECTED_FOLDERS, list_image_folder
from rethink_prune.data.source import Contents, DataSource, ImageFiles
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
    size = options.image_size or _size_of_first(train)
    return DataSource.from_contents(Contents(classes, train, test), image_size=size, channels=options.channels)


def _size_of_first(files: ImageFiles) -> int:
    where, name = f"dataset.root={files.root}", files.name(0)
    try:
        with Image.open(files.root / name) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{where}: cannot read {name} ({error})") from error
    if width != height:
        raise UserError(f"{where}: {name} is {width} x {height}; set dataset.image_size")
    return width


SOURCES = {"folder": folder_source}
