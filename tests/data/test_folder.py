import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rethink_prune.config import DatasetConfig
from rethink_prune.data import ImageDataset, decode_cache, describe_dataset, load_dataset, memory
from rethink_prune.data.decoding import Pixels
from rethink_prune.errors import UserError

MakeFolder = Callable[..., Path]


def load(root: Path, **options: object) -> ImageDataset:
    return load_dataset(
        DatasetConfig(name="folder", root=str(root), **options),  # type: ignore[arg-type]
        cache_dir=root.parent / "cache",
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files that get decoded."""
    sizes: list[int] = []
    original = decode_cache.read_square

    def spy(content: Pixels, size: int, **options: object) -> Pixels:
        sizes.append(len(content))
        return original(content, size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_cache, "read_square", spy)
    return sizes


def test_images_come_sorted_with_their_labels(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train/cat/notes.txt").write_text("not an image")
    (root / "train/cat/.000.png").write_bytes(b"hidden, as some systems leave them")
    dataset = load(root)
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert dataset.test.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    for i, path in enumerate(sorted(root.glob("train/*/[0-9]*.png"))):
        assert np.array_equal(dataset.train.images[i].numpy(), np.asarray(Image.open(path)))


def test_description_counts_without_decoding(make_folder: MakeFolder, decoded: list[int]) -> None:
    info = describe_dataset(DatasetConfig(name="folder", root=str(make_folder(test_name="val")), train_limit=12))
    assert (info.train_images, info.test_images, info.image_size, info.channels) == (12, 6, 8, 3)
    assert info.num_classes == 3
    assert decoded == []


def test_resizing_is_torchvisions_resize_and_centre_crop(make_folder: MakeFolder) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    root = make_folder(size=(96, 64))
    dataset = load(root, image_size=32)
    transform = Compose([Resize(32), CenterCrop(32)])
    expected = np.asarray(transform(Image.open(root / "train/cat/000.png")))
    assert np.abs(dataset.train.images[0].numpy().astype(int) - expected).max() <= 1


def test_grey_is_pillows_luminance(make_folder: MakeFolder) -> None:
    root = make_folder()
    dataset = load(root, channels=1)
    assert dataset.train.images.shape == (18, 8, 8, 1)
    expected = np.asarray(Image.open(root / "train/cat/000.png").convert("L"))
    assert np.array_equal(dataset.train.images[0, :, :, 0].numpy(), expected)
    assert len(dataset.mean) == 1


def test_grey_and_transparent_files_become_colour(make_folder: MakeFolder) -> None:
    root = make_folder()
    Image.new("L", (8, 8), 7).save(root / "train/cat/000.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(root / "train/cat/001.png")
    images = load(root).train.images
    assert images[0].unique().tolist() == [7]
    assert images[1].view(-1, 3).unique(dim=0).tolist() == [[1, 2, 3]]


def test_second_load_decodes_nothing(make_folder: MakeFolder, decoded: list[int]) -> None:
    root = make_folder()
    first = load(root)
    assert len(decoded) == 24
    second = load(root)
    assert len(decoded) == 24
    assert torch.equal(first.train.images, second.train.images)
    assert first.fingerprint == second.fingerprint


def test_touched_file_is_decoded_again(make_folder: MakeFolder, decoded: list[int]) -> None:
    root = make_folder()
    before = load(root)
    changed = root / "test/dog/000.png"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(changed)
    after = load(root)
    assert len(decoded) == 24 + 6  # the test side alone
    assert after.test.images[2].unique().tolist() == [9]
    assert before.fingerprint != after.fingerprint
    os.utime(changed, ns=(0, 0))
    assert load(root).fingerprint == after.fingerprint
    assert len(decoded) == 24 + 6 + 6


def test_copied_folder_has_the_same_fingerprint(make_folder: MakeFolder, decoded: list[int]) -> None:
    root = make_folder()
    copy = root.parent / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    assert load(root).fingerprint == load(copy).fingerprint
    assert len(decoded) == 48


def test_limit_decodes_only_what_it_takes(make_folder: MakeFolder, decoded: list[int]) -> None:
    dataset = load(make_folder(), train_limit=7, test_limit=3)
    assert len(decoded) == 10
    assert sorted(torch.bincount(dataset.train.labels).tolist()) == [2, 2, 3]


def test_subset_does_not_depend_on_the_order_on_disk(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder()
    before = load(root, train_limit=7)
    real = os.scandir

    class Reversed:
        def __init__(self, path: Path) -> None:
            with real(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *exc: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert load(root, train_limit=7).fingerprint == before.fingerprint


def test_validation_is_held_out_of_the_folder(make_folder: MakeFolder, decoded: list[int]) -> None:
    root = make_folder()
    whole = load(root)
    parts = load(root, validation=0.5)
    assert len(decoded) == 24  # the same decoded images serve both
    assert parts.validation is not None
    assert torch.bincount(parts.validation.labels).tolist() == [3, 3, 3]
    together = torch.cat([parts.train.images, parts.validation.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), whole.train.images.flatten(1).unique(dim=0))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_damaged_cache_is_named_and_made_anew(
    make_folder: MakeFolder, decoded: list[int], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    root = make_folder()
    before = load(root)
    entry = max((root.parent / "cache").glob("*.npz"), key=lambda path: path.stat().st_size)
    content = bytearray(entry.read_bytes())
    if damage == "other":
        np.savez(entry, images=np.zeros((2, 2), dtype=np.uint8))
    else:
        content[500] ^= 1
        entry.write_bytes(bytes({"truncated": content[:1000], "flipped": content, "empty": b""}[damage]))
    after = load(root)
    assert after.fingerprint == before.fingerprint
    assert len(decoded) == 24 + 18
    assert f"{entry} is damaged" in caplog.text
    load(root)
    assert len(decoded) == 24 + 18


def test_runs_that_start_together_decode_once(make_folder: MakeFolder, decoded: list[int]) -> None:
    root = make_folder()
    prints: list[str] = []
    threads = [threading.Thread(target=lambda: prints.append(load(root).fingerprint)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prints) == 3
    assert len(set(prints)) == 1
    assert len(decoded) == 24


def test_many_files_fill_several_chunks(make_folder: MakeFolder) -> None:
    root = make_folder(classes=("cat", "dog"), train=decode_cache._CHUNK + 3, test=1)
    images = load(root).train.images
    for i, path in enumerate(sorted(root.glob("train/*/*"))):
        assert np.array_equal(images[i].numpy(), np.asarray(Image.open(path)))


def test_images_that_do_not_fit_are_refused_with_the_numbers(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    with pytest.raises(UserError) as error:
        load(make_folder(), image_size=1024)
    assert str(error.value) == (
        "dataset: 24 images of 1024 x 1024 x 3 need 0.07 GiB of memory, 0.00 GiB are available; "
        "set a smaller dataset.image_size or dataset.train_limit"
    )
    assert decoded == []


def refusal(root: Path | None, **options: object) -> str:
    """Describe a folder and return the error's message, with its root as ROOT."""
    with pytest.raises(UserError) as error:
        describe_dataset(
            DatasetConfig(name="folder", root=None if root is None else str(root), **options)  # type: ignore[arg-type]
        )
    return str(error.value).replace(str(root), "ROOT")


EXPECTED = "expected train/<class>/* and test/<class>/*"


def test_root_must_be_given() -> None:
    assert refusal(None) == f"dataset.root=null: give the folder of the images; {EXPECTED}"


def test_missing_root_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x") == f"dataset.root=ROOT: no such folder; {EXPECTED}"


def test_file_as_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert refusal(tmp_path / "x") == f"dataset.root=ROOT: is a file, not a folder; {EXPECTED}"


def test_empty_root_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"dataset.root=ROOT: has no folders in it; {EXPECTED}"


def test_root_without_train_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train").rename(root / "training")
    assert refusal(root) == f"dataset.root=ROOT: has no train folder, only test, training; {EXPECTED}"


def test_root_without_test_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    shutil.rmtree(root / "test")
    assert refusal(root) == f"dataset.root=ROOT: has neither a test nor a val folder; {EXPECTED}"


def test_test_and_val_together_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    shutil.copytree(root / "test", root / "val")
    assert refusal(root) == (
        "dataset.root=ROOT: has both test and val; keep one under that name "
        "(dataset.validation holds out a part of train)"
    )


def test_one_class_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder(classes=("cat",))
    assert refusal(root) == f"dataset.root=ROOT: train has one class (cat), two or more are needed; {EXPECTED}"


def test_folders_inside_classes_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train/cat/kittens").mkdir()
    assert refusal(root) == "dataset.root=ROOT: train/cat/kittens is a folder; classes hold images only"


def test_images_outside_class_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train/0.png")
    assert refusal(tmp_path) == (f"dataset.root=ROOT: train has no class folders, two or more are needed; {EXPECTED}")


def test_differing_class_names_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "test/dog").rename(root / "test/Dog")
    assert refusal(root) == (
        "dataset.root=ROOT: train and test have different classes; only in train: dog; only in test: Dog"
    )


def test_class_without_images_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    for path in (root / "test/dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert refusal(root).startswith("dataset.root=ROOT: no image in test/dog; images end in .jpg .jpeg .png")


def test_link_to_nowhere_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train/cat/link.png").symlink_to(root / "gone.png")
    assert "dataset.root=ROOT: cannot be listed" in refusal(root)


def test_image_that_is_not_square_needs_a_size(make_folder: MakeFolder) -> None:
    assert refusal(make_folder(size=(8, 6))) == (
        "dataset.root=ROOT: train/cat/000.png is 8 x 6; set dataset.image_size"
    )


def test_unreadable_first_image_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train/cat/000.png").write_bytes(b"not an image")
    assert "dataset.root=ROOT: cannot read train/cat/000.png" in refusal(root)


def test_mixed_sizes_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder()
    Image.new("RGB", (8, 9)).save(root / "train/dog/003.png")
    with pytest.raises(UserError) as error:
        load(root)
    assert str(error.value) == (
        f"dataset.root={root}: train/dog/003.png is 8 x 9, but the first image is 8 x 8; "
        "set dataset.image_size to bring all images to one size"
    )
    assert load(root, image_size=8).train.images.shape == (18, 8, 8, 3)


def test_corrupt_images_are_named_and_nothing_is_kept(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root / "train/cat/002.png").write_bytes(b"not an image")
    whole = (root / "train/emu/001.png").read_bytes()
    (root / "train/emu/001.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(root / "train/emu/002.png")
    with pytest.raises(UserError) as error:
        load(root)
    message = str(error.value)
    assert message.startswith(
        f"dataset.root={root}: 3 images cannot be read: train/cat/002.png (not an image), train/emu/001.png ("
    )
    assert "train/emu/002.png (more than 8 bits per channel" in message
    assert "\n" not in message
    assert not list((root.parent / "cache").glob("*.npz"))


def test_only_the_first_ten_corrupt_images_are_named(make_folder: MakeFolder) -> None:
    root = make_folder()
    for label in ("dog", "emu"):
        for path in (root / "train" / label).iterdir():
            path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        load(root)
    message = str(error.value)
    assert "12 images cannot be read" in message
    assert message.count(".png") == 10
    assert message.endswith(", ...")


def test_cache_that_cannot_be_written_is_named(make_folder: MakeFolder) -> None:
    root = make_folder()
    (root.parent / "cache").touch()
    with pytest.raises(UserError, match="cache: cannot keep the decoded images here"):
        load(root)
