import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data import DatasetInfo, ImageDataset, describe_dataset, load_dataset
from rethink_prune.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts/cifar_to_folder.py"
FakeCifar = Callable[[str], Any]


def describe(name: str, **options: Any) -> DatasetInfo:
    return describe_dataset(DatasetConfig(name=name, **options))


def load(name: str, *, cache_dir: Path, **options: Any) -> ImageDataset:
    return load_dataset(DatasetConfig(name=name, **options), cache_dir=cache_dir)


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_description_needs_no_files(tmp_path: Path, name: str, num_classes: int) -> None:
    info = describe(name, root=str(tmp_path / "nothing"), train_limit=10_000, validation=0.1)
    assert (info.train_images, info.validation_images, info.test_images) == (10_000, 5_000, 10_000)
    assert (info.num_classes, info.channels, info.image_size) == (num_classes, 3, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_is_unpacked_and_read(tmp_path: Path, fake_cifar: FakeCifar, name: str) -> None:
    fake = fake_cifar(name)
    fake.write(tmp_path)
    dataset = load(name, root=str(tmp_path), cache_dir=tmp_path)
    for side in ("train", "test"):
        split = getattr(dataset, side)
        assert np.array_equal(split.images.numpy(), np.concatenate(fake.images[side]))
        assert split.images.is_contiguous()
        assert split.labels.tolist() == fake.labels[side]
    assert dataset.classes[1] == "class 1"
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.std == (0.2023, 0.1994, 0.2010)


def test_unpacked_archive_on_a_read_only_disk_is_enough(
    tmp_path: Path, fake_cifar: FakeCifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_cifar("cifar10")
    fake.write(tmp_path)
    first = load("cifar10", root=str(tmp_path), cache_dir=tmp_path)
    (tmp_path / fake.dataset.filename).unlink()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = load("cifar10", root=str(tmp_path), cache_dir=tmp_path)
    assert second.fingerprint == first.fingerprint
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_offline_says_which_file_to_put_where(tmp_path: Path, fake_cifar: FakeCifar) -> None:
    fake = fake_cifar("cifar100")
    with pytest.raises(UserError) as error:
        load("cifar100", root=str(tmp_path / "here"), cache_dir=tmp_path)
    message = str(error.value)
    assert message.startswith("dataset.name=cifar100: could not be downloaded (")
    assert "refused" in message
    assert message.endswith(
        f"; put cifar-100-python.tar.gz (md5 {fake.dataset.tgz_md5}, from {fake.dataset.url}) into {tmp_path / 'here'}"
    )


def test_damaged_archive_is_not_used(tmp_path: Path, fake_cifar: FakeCifar) -> None:
    fake = fake_cifar("cifar10")
    (tmp_path / fake.dataset.filename).write_bytes(fake.archive[:-10])
    with pytest.raises(UserError, match="could not be downloaded"):
        load("cifar10", root=str(tmp_path), cache_dir=tmp_path)


def run_script(fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *extra: str) -> None:
    """Run the script in this process, where torchvision knows the small archive."""
    fake.write(tmp_path / "source")
    arguments = [
        "--dataset",
        "cifar10",
        "--source",
        str(tmp_path / "source"),
        "--target",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *extra])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_writes_a_folder_with_the_same_pixels(
    tmp_path: Path, fake_cifar: FakeCifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_cifar("cifar10")
    run_script(fake, monkeypatch, tmp_path)
    folder = load("folder", root=str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    cifar = load("cifar10", root=str(tmp_path / "source"), cache_dir=tmp_path / "cache")
    assert folder.classes == cifar.classes
    order = torch.argsort(cifar.train.labels, stable=True)
    assert torch.equal(folder.train.images, cifar.train.images[order])
    assert torch.equal(folder.train.labels, cifar.train.labels[order])


def test_script_can_limit_and_compress(tmp_path: Path, fake_cifar: FakeCifar, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(fake_cifar("cifar10"), monkeypatch, tmp_path, "--limit", "2", "--jpeg-quality", "90")
    assert len(list((tmp_path / "out/train/class 3").glob("*.jpg"))) == 2
    assert len(list((tmp_path / "out/test/class 3").glob("*.jpg"))) == 1


def test_script_refuses_a_target_in_use(tmp_path: Path, fake_cifar: FakeCifar, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").touch()
    with pytest.raises(SystemExit, match="is there already and not empty"):
        run_script(fake_cifar("cifar10"), monkeypatch, tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_script_says_which_file_is_missing(
    tmp_path: Path, fake_cifar: FakeCifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_cifar("cifar10")
    monkeypatch.setattr(fake, "write", lambda root: None)
    with pytest.raises(SystemExit, match=r"put cifar-10-python\.tar\.gz"):
        run_script(fake, monkeypatch, tmp_path)
    assert not (tmp_path / "out").exists()


def test_script_explains_itself(
    tmp_path: Path,
    fake_cifar: FakeCifar,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(fake_cifar("cifar10"), monkeypatch, tmp_path, "--help")
    assert end.value.code == 0
    assert "--jpeg-quality" in capsys.readouterr().out
