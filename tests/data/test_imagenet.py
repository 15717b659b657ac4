import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data import DatasetInfo, ImageDataset, ImageFiles, describe_dataset, load_dataset
from rethink_prune.errors import UserError

Make = Callable[..., Path]


def load(root: Path, **options: object) -> ImageDataset:
    return load_dataset(
        DatasetConfig(name="imagenet", root=str(root), **options),  # type: ignore[arg-type]
        cache_dir=root.parent / "cache",
    )


def names(files: ImageFiles | object) -> list[str]:
    assert isinstance(files, ImageFiles)
    return [files.name(i) for i in range(len(files))]


def test_description_needs_no_files(tmp_path: Path) -> None:
    assert describe_dataset(DatasetConfig(name="imagenet", root=str(tmp_path / "nothing"))) == DatasetInfo(
        name="imagenet",
        num_classes=1000,
        train_images=1_281_167,
        validation_images=0,
        test_images=50_000,
        channels=3,
        image_size=224,
    )


def test_size_and_subsets_can_be_chosen() -> None:
    info = describe_dataset(DatasetConfig(name="imagenet", image_size=64, train_limit=100_000, test_limit=10_000))
    assert (info.image_size, info.train_images, info.test_images) == (64, 100_000, 10_000)


def test_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.channels=1: imagenet images have 3 channels"):
        describe_dataset(DatasetConfig(name="imagenet", channels=1))


def test_what_is_there_is_listed(make_photographs: Make) -> None:
    root = make_photographs(classes=4, train=5, val=2)
    (root / "train/n00000000/notes.txt").touch()
    info = describe_dataset(DatasetConfig(name="imagenet", root=str(root), validation=0.2))
    assert (info.num_classes, info.train_images, info.validation_images, info.test_images) == (4, 16, 4, 8)
    dataset = load(root)
    assert dataset.classes == tuple(f"n{label:08d}" for label in range(4))
    assert names(dataset.train) == [f"train/n{c:08d}/train_{c}_{i}.JPEG" for c in range(4) for i in range(5)]
    assert names(dataset.test) == [f"val/n{c:08d}/val_{c}_{i}.JPEG" for c in range(4) for i in range(2)]
    assert dataset.train.labels.tolist() == torch.arange(4).repeat_interleave(5).tolist()
    assert dataset.mean == (0.485, 0.456, 0.406)
    assert dataset.validation is None


def test_listing_decodes_nothing(make_photographs: Make) -> None:
    root = make_photographs()
    for path in root.rglob("*.JPEG"):
        path.write_bytes(b"")
    assert len(load(root).train) == 18


def test_held_out_images_and_limits_are_those_of_any_folder(make_photographs: Make) -> None:
    root = make_photographs(train=10, val=4)
    options = {"validation": 0.2, "train_limit": 9, "test_limit": 6, "split_seed": 3}
    dataset = load(root, **options)
    assert [len(part) for part in (dataset.train, dataset.validation or (), dataset.test)] == [9, 6, 6]
    assert not set(names(dataset.train)) & set(names(dataset.validation))
    folder = DatasetConfig(name="folder", root=str(root), image_size=8, **options)  # type: ignore[arg-type]
    other = load_dataset(folder, cache_dir=root.parent / "cache")
    assert torch.equal(other.train.labels, dataset.train.labels)


def test_fingerprint_covers_classes_counts_and_choices(make_photographs: Make) -> None:
    root = make_photographs(train=10)
    variants: list[dict[str, object]] = [
        {},
        {"train_limit": 9},
        {"train_limit": 9, "split_seed": 1},
        {"test_limit": 3},
        {"validation": 0.2},
        {"image_size": 32},
        {"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]},
    ]
    prints = [load(root, **options).fingerprint for options in variants]
    assert len(set(prints)) == len(variants)
    assert load(root, split_seed=5).fingerprint == prints[0]
    moved = root.rename(root.parent / "elsewhere")
    assert load(moved).fingerprint == prints[0]
    (moved / "train/n00000001/train_1_0.JPEG").unlink()
    fewer = load(moved).fingerprint
    for side in ("train", "val"):
        (moved / side / "n00000001").rename(moved / side / "n00000009")
    assert len({prints[0], fewer, load(moved).fingerprint}) == 3


def test_loading_without_a_folder_says_how_to_get_one(tmp_path: Path) -> None:
    for root, words in (
        (None, "dataset.root=null: give the folder that holds train/<wnid>/* and val/<wnid>/*"),
        (str(tmp_path / "gone"), f"dataset.root={tmp_path}/gone: no such folder; it should hold train/<wnid>/*"),
    ):
        with pytest.raises(UserError) as error:
            load_dataset(DatasetConfig(name="imagenet", root=root), cache_dir=tmp_path)
        assert str(error.value).startswith(words)
        assert "scripts/prepare_imagenet.py" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_wrong_folders_are_named(make_photographs: Make) -> None:
    root = make_photographs()

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            describe_dataset(DatasetConfig(name="imagenet", root=str(root)))
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(root), "ROOT")

    extra = root / "val/n00000000/deeper"
    extra.mkdir()
    assert refusal() == "dataset.root=ROOT: val/n00000000/deeper is a folder; classes hold images only"
    extra.rmdir()
    (root / "val/n00000007").mkdir()
    assert refusal() == "dataset.root=ROOT: train and val have different classes; only in val: n00000007"
    (root / "train/n00000007").mkdir()
    assert refusal().startswith("dataset.root=ROOT: no image in train/n00000007")
    shutil.rmtree(root / "val")
    assert refusal().startswith("dataset.root=ROOT: has neither a test nor a val folder")
    # Validation images straight from their archive: all in one folder, without classes.
    (root / "val").mkdir()
    (root / "val/ILSVRC2012_val_00000001.JPEG").touch()
    assert refusal().startswith("dataset.root=ROOT: train and val have different classes; only in train: n00000000")
