"""Images that `datasets` loads, of parquet files that are made here: the same as those of a folder."""

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rethink_prune.config import DatasetConfig
from rethink_prune.data import DatasetInfo, ImageDataset, decode_cache, describe_dataset, load_dataset, train_batches
from rethink_prune.data.sources.huggingface import ImageRows
from rethink_prune.errors import UserError
from rethink_prune.export import main as export

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MakeFolder = Callable[..., Path]
Run = Callable[..., dict[str, Any]]
MIXED = ("cat", "dog", "emu")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tables in the test's own folder, and leave the network alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tables")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_table(file: Path, images: Sequence[Any], labels: Sequence[Any], classes: Sequence[str] | None = None) -> None:
    """Write a parquet file as `datasets` does, or with bare columns if there are no classes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if classes is None:
        pq.write_table(pa.table({"image": images, "label": labels}), file)
        return
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    rows = [{"bytes": image, "path": None} for image in images]
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(file)


def to_parquet(folder: Path, target: Path, *, shards: int = 1) -> Path:
    """Write the images of a folder as parquet files, in the folder's order."""
    for side in sorted(folder.iterdir()):
        classes = sorted(path.name for path in side.iterdir())
        files = [(path, label) for label, name in enumerate(classes) for path in sorted((side / name).iterdir())]
        split = {"val": "validation"}.get(side.name, side.name)
        for shard, part in enumerate(np.array_split(np.arange(len(files)), shards)):
            images, labels = zip(*[(files[i][0].read_bytes(), files[i][1]) for i in part], strict=True)
            write_table(target / f"{split}-{shard:05d}-of-{shards:05d}.parquet", images, labels, classes)
    return target


def options(path: object, **others: Any) -> DatasetConfig:
    return DatasetConfig(name="huggingface", path=str(path), **others)


def load(path: Path, **others: Any) -> ImageDataset:
    return load_dataset(options(path, **others), cache_dir=path.parent / "cache")


def refusal(path: object, **others: Any) -> str:
    with pytest.raises(UserError) as error:
        describe_dataset(options(path, **others))
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "PATH")


def png(value: int, size: int = 4) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("subset", [{}, {"validation": 0.5, "train_limit": 5, "test_limit": 3}])
def test_all_is_as_in_a_folder_with_the_same_images(
    make_folder: MakeFolder, tmp_path: Path, subset: dict[str, Any]
) -> None:
    root = make_folder()
    # What people have: grey, transparent and CMYK images, and files that are not what their names say.
    Image.new("L", (8, 8), 7).save(root / "train/cat/000.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(root / "train/cat/001.png")
    Image.new("CMYK", (8, 8), (9, 80, 7, 60)).save(root / "train/dog/001.png", "JPEG")
    folder = load_dataset(DatasetConfig(name="folder", root=str(root), **subset), cache_dir=tmp_path / "cache")
    rows = load(to_parquet(root, tmp_path / "parquet", shards=2), **subset)
    for ours, theirs in ((rows.train, folder.train), (rows.test, folder.test), (rows.validation, folder.validation)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
    assert rows.classes == folder.classes
    assert rows.fingerprint == folder.fingerprint, "so they share their stages, too"


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_come_as_imagenets(make_photographs: MakeFolder, tmp_path: Path, workers: int) -> None:
    root = make_photographs()
    common: dict[str, Any] = {"image_size": 32, "workers": workers, "flip": True, "validation": 0.2}
    path = to_parquet(root, tmp_path / "parquet", shards=2)
    both = options(path, streamed=True, **common), DatasetConfig(name="imagenet", root=str(root), **common)
    epochs = []
    for each in both:
        dataset = load_dataset(each, cache_dir=tmp_path / "cache")
        assert dataset.mean == (0.485, 0.456, 0.406)
        assert [len(part or ()) for part in (dataset.train, dataset.validation, dataset.test)] == [15, 3, 6]
        cpu = torch.device("cpu")
        epochs.append(list(train_batches(dataset, each, batch_size=4, augment=True, device=cpu, seed=0).epoch(1)))
    for (ours, our_labels), (theirs, their_labels) in zip(*epochs, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(our_labels, their_labels)


def test_streamed_and_kept_are_the_same_rows(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = to_parquet(make_folder(), tmp_path / "parquet")
    chosen: dict[str, Any] = {"train_limit": 7, "test_limit": 4, "validation": 0.2}
    kept, streamed = load(path, **chosen), load(path, streamed=True, **chosen)
    assert isinstance(streamed.train, ImageRows)
    assert torch.equal(kept.train.labels, streamed.train.labels)
    for i in range(7):
        with Image.open(io.BytesIO(streamed.train.read(i).data)) as image:
            assert np.array_equal(kept.train.images[i].numpy(), np.asarray(image))
    assert streamed.image_size == 224


@pytest.mark.parametrize("streamed", [False, True])
def test_fingerprint_is_of_the_content(make_folder: MakeFolder, tmp_path: Path, streamed: bool) -> None:
    root = make_folder()

    def fingerprint(path: Path, **others: Any) -> str:
        return load(path, streamed=streamed, **others).fingerprint

    first = to_parquet(root, tmp_path / "first")
    before = fingerprint(first)
    moved = first.rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    assert fingerprint(to_parquet(root, tmp_path / "sharded", shards=3)) == before
    assert fingerprint(moved, validation=0.5) != before
    # Bare pixels: the file with another value is as long as before.
    changed = root / "test/dog/000.png"
    for value in (3, 200):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(changed.with_suffix(".bmp"))
        changed.write_bytes(changed.with_suffix(".bmp").read_bytes())
        changed.with_suffix(".bmp").unlink()
        now = fingerprint(to_parquet(root, tmp_path / f"changed {value}"))
        assert now != before
        before = now
    (root / "test/dog/001.png").rename(root / "test/emu/0011.png")
    assert fingerprint(to_parquet(root, tmp_path / "relabelled")) != before


def test_content_is_read_once_for_its_fingerprint(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = to_parquet(make_folder(), tmp_path / "parquet")
    reads = []
    real = ImageRows.read
    monkeypatch.setattr(ImageRows, "read", lambda self, position: reads.append(position) or real(self, position))
    first = load(path, streamed=True)
    assert len(reads) == 24
    assert load(path, streamed=True).fingerprint == first.fingerprint
    assert load(path, streamed=True, train_limit=6).fingerprint != first.fingerprint
    assert len(reads) == 24


def test_description_decodes_no_image(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = to_parquet(make_folder(test_name="val"), tmp_path / "parquet")
    monkeypatch.setattr(decode_cache, "read_square", None)
    monkeypatch.setattr(Image.Image, "load", None)
    assert describe_dataset(options(path, train_limit=12)) == DatasetInfo("huggingface", 3, 12, 0, 6, 3, 8)
    monkeypatch.setattr(ImageRows, "read", None)
    assert describe_dataset(options(path, streamed=True)) == DatasetInfo("huggingface", 3, 18, 0, 6, 3, 224)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([7, -2, 7, 30], ("-2", "7", "30")), (["dog", "cat", "emu", "cat"], ("cat", "dog", "emu"))],
)
def test_classes_of_numbers_and_text_are_their_sorted_values(
    tmp_path: Path, labels: list[Any], classes: tuple[str, ...]
) -> None:
    path, images = tmp_path / "parquet", [png(i) for i in range(4)]
    stored = [{"bytes": image} for image in images] if labels[0] == "dog" else images  # bare columns
    write_table(path / "train.parquet", stored, labels)
    write_table(path / "test.parquet", stored[:2], labels[:2])
    dataset = load(path)
    assert dataset.classes == classes
    assert [classes[label] for label in dataset.train.labels] == list(map(str, labels))
    assert [classes[label] for label in dataset.test.labels] == list(map(str, labels[:2]))
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    write_table(path / "test.parquet", stored[:2], [labels[0], labels[0] * 2])
    other = f"test has the label {labels[0] * 2}, which is none of the 3 classes"
    assert refusal(path) == f"dataset.label_key=label: {other}"


def test_images_may_lie_beside_their_table(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder()
    folder = load_dataset(DatasetConfig(name="folder", root=str(root)), cache_dir=tmp_path / "cache")
    assert load(root).fingerprint == folder.fingerprint


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").touch()
    assert refusal(tmp_path / "train.parquet").startswith("dataset.path=PATH: is a file; give the name of a set")
    assert refusal(tmp_path / "nowhere").startswith("dataset.path=PATH: no such folder; give the name of a set")


def test_splits_and_columns_are_chosen_by_name(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = to_parquet(make_folder(), tmp_path / "parquet")
    shutil.copy(path / "train-00000-of-00001.parquet", path / "validation-00000-of-00001.parquet")
    assert len(load(path).test) == 6
    assert len(load(path, test_split="validation").test) == 18
    assert len(load(path, train_split="test", test_split="train").train) == 6
    found = "PATH has train, validation, test"
    assert refusal(path, train_split="all") == f"dataset.train_split=all: there is no such split; {found}"
    assert refusal(path, test_split="train") == f"dataset.test_split=train: is the split to train on, too; {found}"
    columns = "there is no such column; PATH has image, label"
    assert refusal(path, image_key="img") == f"dataset.image_key=img: {columns}"
    assert refusal(path, label_key="fine") == f"dataset.label_key=fine: {columns}"
    assert refusal(path, image_key="label").startswith("dataset.image_key=label: holds ClassLabel(")
    assert refusal(path, label_key="image").startswith("dataset.label_key=image: holds Image(")
    for file in path.glob("[tv]*[tn]-*"):
        if not file.name.startswith("train"):
            file.unlink()
    assert refusal(path) == (
        "dataset.test_split=null: PATH has train, but neither test nor validation; name one of its splits"
    )


def test_labels_that_cannot_be_learned_are_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "parquet", [png(1), png(2)]
    where = "dataset.label_key=label:"
    for labels, message in (
        ([0, None], f"{where} 1 rows of train have no label"),
        ([0.5, 1.5], f"{where} holds Value('float64'); labels are ClassLabel, integers or text"),
        ([4, 4], f"{where} has one class (4), two or more are needed"),
    ):
        write_table(path / "train.parquet", images, labels)
        write_table(path / "test.parquet", images, labels)
        assert refusal(path) == message
    write_table(path / "train.parquet", images, [0, 1], MIXED)
    write_table(path / "test.parquet", images, [-1, -1], MIXED)  # as where the labels are secret
    assert refusal(path) == f"{where} test has the label -1, which is none of the 3 classes"
    write_table(path / "test.parquet", [], [], MIXED)
    assert refusal(path).startswith('dataset.path=PATH: cannot be loaded (Instruction "test" corresponds to no data')


def test_parts_of_a_set_are_chosen_by_name(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = tmp_path / "parquet"
    for part in ("plain", "hard"):
        to_parquet(make_folder(part, train={"plain": 6, "hard": 2}[part]), path / part)
    listed = "".join(f"\n- config_name: {part}\n  data_dir: {part}" for part in ("plain", "hard"))
    (path / "README.md").write_text(f"---\nconfigs:{listed}\n---\n")
    assert len(load(path, config="hard").train) == 6
    for message in (refusal(path), refusal(path, config="odd")):
        assert message.startswith("dataset.path=PATH: cannot be loaded (")
        assert "'plain', 'hard'" in message
        assert message.endswith("choose one with dataset.config")


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    advice = "give the name of a set on the Hugging Face Hub, or a folder with train-*.parquet and test-*.parquet"
    with pytest.raises(UserError, match=r"dataset\.path=null: give the name of a set on the Hugging Face Hub"):
        describe_dataset(DatasetConfig(name="huggingface"))
    message = refusal("somebody/something")
    assert message.startswith("dataset.path=PATH: cannot be loaded (Couldn't reach 'PATH' on the Hub")
    assert message.endswith("; check the network; what was loaded before needs none with HF_HUB_OFFLINE=1")
    for path in (tmp_path / "gone", tmp_path):
        assert refusal(path).endswith(advice)
    assert refusal("some/set", revision="main") == (
        "dataset.revision=main: give a commit, 40 hexadecimal digits; branches and tags move"
    )
    assert refusal(tmp_path, revision="main") == "dataset.revision=main: PATH is a folder, which has no revisions"
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded/coded.py").write_text("raise SystemExit('this was run')")
    assert "code that comes with a set is never run" in refusal(tmp_path / "coded")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/train.parquet").write_bytes(b"no table")
    assert refusal(tmp_path / "odd").startswith("dataset.path=PATH: cannot be loaded (Parquet")
    with pytest.raises(ValueError, match="path, streamed: only dataset=huggingface takes this"):
        DatasetConfig(name="folder", path="x", streamed=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("x").endswith('; install it with pip install "rethink-prune[hub]"')


def test_without_a_network_what_was_loaded_before_is_found(make_folder: MakeFolder, tmp_path: Path) -> None:
    path = to_parquet(make_folder(), tmp_path / "parquet")
    before = load(path)
    (table,) = (tmp_path / "tables").glob("parquet/default/0.0.0/*/")
    for age, commit in ((1, "a" * 40), (0, "b" * 40)):  # as `datasets` keeps two versions of a set on the hub
        kept = tmp_path / "tables/owner___parquet/default/0.0.0" / commit
        shutil.copytree(table, kept)
        os.utime(kept, (time.time() - age,) * 2)
        shutil.rmtree(path, ignore_errors=True)
        assert load_dataset(options("owner/parquet"), cache_dir=tmp_path).fingerprint == before.fingerprint
    assert describe_dataset(options("owner/parquet", revision="b" * 40)).train_images == 18
    message = refusal("owner/parquet", revision="a" * 40)  # a silent choice of the newest otherwise
    assert message == f"dataset.revision={'a' * 40}: the hub cannot be reached; {'b' * 40} was loaded last"


@pytest.mark.parametrize("streamed", [False, True])
def test_images_that_cannot_be_read_are_named(tmp_path: Path, streamed: bool) -> None:
    path = tmp_path / "parquet"
    for split in ("train", "test"):
        write_table(path / f"{split}.parquet", [png(1), b"no image", png(3), png(4)], [0, 1, 0, 1], MIXED)
    each = options(path, streamed=streamed, workers=0, image_size=8)
    expected = r"dataset\.path=.*: (1 image cannot be read: )?train/image 1 (cannot be read )?\(not an image\)"

    def first_epoch() -> None:
        dataset = load_dataset(each, cache_dir=tmp_path / "cache")
        batches = train_batches(dataset, each, batch_size=4, augment=True, device=torch.device("cpu"), seed=0)
        list(batches.epoch(0))

    with pytest.raises(UserError, match=expected):
        first_epoch()
    write_table(path / "train.parquet", [{"bytes": png(1)}, {"bytes": None}], [0, 1])
    write_table(path / "test.parquet", [{"bytes": png(1)}, {"bytes": png(2)}], [0, 1])
    with pytest.raises(UserError, match=r"train/image 1 .*the row has no image"):
        load_dataset(each, cache_dir=tmp_path / "cache")


def test_streamed_images_are_in_colour(tmp_path: Path) -> None:
    assert refusal("x", streamed=True, channels=1) == "dataset.channels=1: streamed images have 3 channels"


def test_the_study_of_a_set_that_moved_is_in_the_store(
    make_folder: MakeFolder, small_study: Run, tmp_path: Path
) -> None:
    path = to_parquet(make_folder(size=(20, 16)), tmp_path / "parquet")
    whole = ("dataset.train_limit=null", "dataset.test_limit=null", "dataset.streamed=true", "dataset.workers=0")
    arguments = ("dataset=huggingface", *whole, "recipe.batch_size=8", "arms=[finetune,scratch_e]")
    summary = small_study(*arguments, f"dataset.path={path}")
    assert (summary["study"]["train_images"], summary["study"]["test_images"]) == (18, 6)
    moved = path.rename(tmp_path / "elsewhere")
    assert small_study(*arguments, f"dataset.path={moved}")["arms"] == summary["arms"], "with the seconds they took"
    on_cpu = ("--device", "cpu", "--precision", "fp32")
    arm, found = summary["arms"]["finetune"], tmp_path / "found.json"
    images = ("dataset=huggingface", f"dataset.path={moved}", "dataset.streamed=true", "dataset.image_size=8")
    assert export([arm["stage"], *on_cpu, "--json", str(found), "--evaluate", *images]) == 0
    assert json.loads(found.read_text())["loss"] == pytest.approx(arm["loss"])
