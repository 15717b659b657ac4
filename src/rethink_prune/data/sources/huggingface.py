"""Images that the package ``datasets`` loads: a set of the Hugging Face Hub by its name, or a folder of parquet files.

``datasets`` downloads a set, or reads its files, once, and keeps the rows in ``HF_DATASETS_CACHE`` as a table on the
disk. It never runs code that comes with a set. The options:

- ``path``: a name on the hub, or a folder;
- ``config``: which part, of a set that has several; ``revision``: which commit, of a set on the hub;
- ``train_split``, ``test_split``: the splits to train on and to test on; without the latter, ``test`` or else
  ``validation``;
- ``image_key``: the column with the images, as files in the table (``datasets.Image``, or bytes);
- ``label_key``: the column with the labels: ``datasets.ClassLabel``, integers or text. The classes of the last two are
  the values in the training split, sorted;
- ``streamed``: decode images in every epoch, as :mod:`~rethink_prune.data.sources.imagenet` does; otherwise once, as
  :mod:`~rethink_prune.data.sources.folder` does.

The name, the revision and the folder do not count for a fingerprint: it is made of the images. Those that are streamed
are read once for it. The fingerprint that ``datasets`` gives a table would not do: for a folder, it changes with its
path and with the times of its files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from tqdm import tqdm

from rethink_prune.config import DatasetConfig
from rethink_prune.data.source import Contents, DataSource, EncodedImages
from rethink_prune.data.sources.folder import size_of_first
from rethink_prune.data.sources.imagenet import STATISTICS
from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically

RANK = 50
_TEST_SPLITS = ("test", "validation")
_STREAMED_SIZE = 224
_EXPECTED = "give the name of a set on the Hugging Face Hub, or a folder with train-*.parquet and test-*.parquet"


@dataclass(frozen=True)
class ImageRows(EncodedImages):
    """Images in rows of a table on the disk, with their labels.

    Attributes
    ----------
    path : str
        What a user calls the set.
    split, column : str
        Which table of the set it is, and where the images are in it.
    table : datasets.Dataset
        Has that column alone. Sent to another process, it is opened there anew.
    files : tuple of Path
        What holds the table.
    rows : numpy.ndarray
        Each image's row, int64, N.
    root, labels, versions
        As of :class:`~rethink_prune.data.source.EncodedImages`.
    """

    root: Path
    path: str
    split: str
    column: str
    table: Any
    files: tuple[Path, ...]
    rows: npt.NDArray[np.int64]
    labels: torch.Tensor
    versions: npt.NDArray[np.int64] | None = None

    @property
    def option(self) -> str:
        """The option that says which set it is, as errors name it."""
        return f"dataset.path={self.path}"

    def name(self, position: int) -> str:
        """Return an image's split, column and row."""
        return f"{self.split}/{self.column} {self.rows[position]}"

    def read(self, position: int) -> npt.NDArray[np.uint8]:
        """Return an image as it is stored, in the table or in a file of its own."""
        stored = self.table[int(self.rows[position])][self.column]
        if stored["bytes"] is not None:
            return np.frombuffer(bytearray(stored["bytes"]), dtype=np.uint8)  # a copy, for torch wants to write to it
        if stored["path"] is None:
            raise ValueError("the row has no image")
        return np.fromfile(stored["path"], dtype=np.uint8)

    def digest(self, cache_dir: Path, *, progress: bool) -> str:
        """Return the SHA-256 of all labels and images; reads them once, and keeps the result while the table is."""
        labels = self.labels.numpy().astype("<i8").tobytes()
        table = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]
        kept_for = hashlib.sha256(json.dumps([table, self.column]).encode() + labels).hexdigest()[:32]
        entry = cache_dir / f"{kept_for}.sha256"
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_suffix(".lock")):
                if not entry.exists():
                    write_atomically(entry, self._read_all(hashlib.sha256(labels), progress).encode())
                return entry.read_text()
        except OSError as error:
            raise UserError(f"{cache_dir}: cannot keep the digest of the images here ({error})") from error

    def _read_all(self, digest: Any, progress: bool) -> str:
        label = f"reading {self.split}"
        for i in tqdm(range(len(self)), desc=label, unit="image", disable=None if progress else True):
            try:
                content = self.read(i)
            except Exception as error:
                raise UserError(f"{self.option}: {self.name(i)} cannot be read ({error})") from error
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content.data)
        return str(digest.hexdigest())

    def take(self, positions: torch.Tensor) -> "ImageRows":
        """Return the rows at these positions (int64)."""
        index = positions.numpy()
        versions = None if self.versions is None else self.versions[index]
        return replace(self, rows=self.rows[index], labels=self.labels[positions], versions=versions)


def huggingface_source(options: DatasetConfig) -> DataSource:
    """Load the tables of ``options.path``, which can download them, and read their labels; decodes no image.

    With ``options.image_size=None``, streamed images become 224 x 224, and others keep their size, as in a folder.

    Raises
    ------
    UserError
        The package is missing, the set cannot be loaded, a split or a column is missing or holds something else, or
        labels do not fit the classes.
    """
    if options.path is None:
        raise UserError(f"dataset.path=null: {_EXPECTED}")
    if options.streamed and options.channels != 3:
        raise UserError(f"dataset.channels={options.channels}: streamed images have 3 channels")
    tables = _choose_splits(options, _load_splits(options))
    classes, labels = _read_labels(options, tables)
    train, test = (_open_images(options, split, tables[split], labels[split]) for split in tables)
    contents = Contents(classes, train, test, STATISTICS if options.streamed else None)
    size = options.image_size or (_STREAMED_SIZE if options.streamed else size_of_first(train))
    return DataSource.from_contents(contents, image_size=size, channels=options.channels)


def _load_splits(options: DatasetConfig) -> Mapping[str, Any]:
    """Return the table of each split."""
    try:
        from datasets import load_dataset  # takes a second to import
    except ImportError as error:
        install = 'pip install "rethink-prune[hub]"'
        raise UserError(f"dataset=huggingface: needs datasets ({error}); install it with {install}") from None
    folder = Path(str(options.path)).expanduser()
    # No name on the hub begins so.
    if folder.is_file() or (not folder.is_dir() and str(options.path).startswith(("/", ".", "~"))):
        problem = "is a file" if folder.is_file() else "no such folder"
        raise UserError(f"dataset.path={options.path}: {problem}; {_EXPECTED}")
    revision = options.revision
    if revision is not None and folder.is_dir():
        raise UserError(f"dataset.revision={revision}: {options.path} is a folder, which has no revisions")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is None:
        raise UserError(f"dataset.revision={revision}: give a commit, 40 hexadecimal digits; branches and tags move")
    path = str(folder.absolute()) if folder.is_dir() else options.path
    try:
        # On the disk: a set can be larger than the memory.
        splits: Mapping[str, Any] = load_dataset(path, options.config, revision=revision, keep_in_memory=False)
    except Exception as error:  # of the network, of files, of what is in them: many packages' own
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(f"dataset.path={options.path}: cannot be loaded ({reason}); {_advice(error)}") from error
    # Without the hub, `datasets` takes what it loaded last, of any version. The folder is named after the commit.
    found = {Path(file["filename"]).parent.name for table in splits.values() for file in table.cache_files}
    if revision is not None and found != {revision}:
        last = ", ".join(sorted(found))
        raise UserError(f"dataset.revision={revision}: the hub cannot be reached; {last} was loaded last")
    return splits


def _advice(error: Exception) -> str:
    match error:
        case ConnectionError():
            return "check the network; what was loaded before needs none with HF_HUB_OFFLINE=1"
        case FileNotFoundError():
            return _EXPECTED
        case RuntimeError() if "script" in str(error):
            return "code that comes with a set is never run: take a version of the set in parquet files"
        case ValueError() if "onfig" in str(error):
            return "choose one with dataset.config"
    return "HYDRA_FULL_ERROR=1 shows where"


def _choose_splits(options: DatasetConfig, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables to train on and to test on, by the names of their splits."""
    found = f"{options.path} has {', '.join(splits)}"
    test = options.test_split or next((name for name in _TEST_SPLITS if name in splits), None)
    if test is None:
        raise UserError(
            f"dataset.test_split=null: {found}, but neither {' nor '.join(_TEST_SPLITS)}; name one of its splits"
        )
    for option, name in (("train_split", options.train_split), ("test_split", test)):
        if name not in splits:
            raise UserError(f"dataset.{option}={name}: there is no such split; {found}")
    if test == options.train_split:
        raise UserError(f"dataset.test_split={test}: is the split to train on, too; {found}")
    return {name: splits[name] for name in (options.train_split, test)}


def _find_column(options: DatasetConfig, option: str, table: Any) -> Any:
    name = getattr(options, option)
    if name not in table.column_names:
        columns = ", ".join(table.column_names)
        raise UserError(f"dataset.{option}={name}: there is no such column; {options.path} has {columns}")
    return table.data.column(name)


def _read_labels(options: DatasetConfig, tables: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    """Return the classes, and the labels of each split."""
    import pyarrow as pa
    import pyarrow.compute as pc

    where = f"dataset.label_key={options.label_key}"
    columns = {split: _find_column(options, "label_key", table) for split, table in tables.items()}
    train, feature = columns[options.train_split], tables[options.train_split].features[options.label_key]
    for split, column in columns.items():
        if column.null_count:
            raise UserError(f"{where}: {column.null_count} rows of {split} have no label")
    names = getattr(feature, "names", None)  # of a ClassLabel, whose values are 0, 1, ...
    if names is None and not (pa.types.is_integer(train.type) or pa.types.is_string(train.type)):
        raise UserError(f"{where}: holds {feature}; labels are ClassLabel, integers or text")
    values = list(range(len(names))) if names else sorted(train.unique().to_pylist())
    classes = tuple(map(str, names or values))
    if len(classes) < 2:
        raise UserError(f"{where}: has one class ({classes[0]}), two or more are needed")
    labels = {}
    for split, column in columns.items():
        index = pc.index_in(column, value_set=pa.array(values, train.type))
        if index.null_count:
            other = column.filter(index.is_null())[0]
            # Sets whose labels are secret have -1 for all of them.
            raise UserError(f"{where}: {split} has the label {other}, which is none of the {len(values)} classes")
        labels[split] = torch.from_numpy(index.to_numpy().astype(np.int64))
    return classes, labels


def _open_images(options: DatasetConfig, split: str, table: Any, labels: torch.Tensor) -> ImageRows:
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Image

    key, stored = options.image_key, _find_column(options, "image_key", table).type
    if not (pa.types.is_binary(stored) or (pa.types.is_struct(stored) and stored.get_field_index("bytes") >= 0)):
        raise UserError(f"dataset.image_key={key}: holds {table.features[key]}, not images or their bytes")
    files = tuple(Path(file["filename"]) for file in table.cache_files)
    images = table.select_columns([key]).cast_column(key, Image(decode=False))
    rows, versions = np.arange(len(labels)), None
    if not options.streamed:
        sizes = pc.binary_length(pc.struct_field(images.data.column(key), "bytes")).fill_null(0).to_numpy()
        changed = max(file.stat().st_mtime_ns for file in files)
        versions = np.stack([sizes.astype(np.int64), np.full(len(rows), changed)], axis=1)
    return ImageRows(files[0].parent, str(options.path), split, key, images, files, rows, labels, versions)


SOURCES = {"huggingface": huggingface_source}
