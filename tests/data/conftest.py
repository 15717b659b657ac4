"""Small image folders and a stand-in for CIFAR's archives."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes a folder of random images, `train` and `test` images for each class."""

    def make(
        name: str = "images",
        *,
        classes: tuple[str, ...] = ("cat", "dog", "emu"),
        train: int = 6,
        test: int = 2,
        size: tuple[int, int] = (8, 8),
        ending: str = ".png",
        test_name: str = "test",
    ) -> Path:
        root = tmp_path / name
        random = np.random.default_rng(0)
        for side, count in (("train", train), (test_name, test)):
            for label in classes:
                folder = root / side / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03d}{ending}")
        return root

    return make


@pytest.fixture
def make_photographs(tmp_path: Path) -> MakeFolder:
    """Return a function that writes photographs as ImageNet has them: JPEG files of many sizes, smooth, in colour."""

    def make(name: str = "photographs", *, classes: int = 3, train: int = 6, val: int = 2) -> Path:
        random = np.random.default_rng(0)
        for side, count in (("train", train), ("val", val)):
            for label in range(classes):
                folder = tmp_path / name / side / f"n{label:08d}"
                folder.mkdir(parents=True)
                for i in range(count):
                    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                    size = tuple(random.integers(40, 90, 2).tolist())
                    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
                        folder / f"{side}_{label}_{i}.JPEG", quality=95
                    )
        return tmp_path / name

    return make


class FakeCifar:
    """An archive in torchvision's format with few images, known to torchvision by its own checksum."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets

        self.dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        num_classes = {"cifar10": 10, "cifar100": 100}[name]
        label_key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
        random = np.random.default_rng(0)
        files: dict[str, bytes] = {}
        self.images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        self.labels: dict[str, list[int]] = {"train": [], "test": []}
        for side, members in (("train", self.dataset.train_list), ("test", self.dataset.test_list)):
            for member, _ in members:
                rows = random.integers(0, 256, (num_classes, 3 * 32 * 32), dtype=np.uint8)
                labels = random.permutation(num_classes).tolist()
                files[member] = pickle.dumps({"data": rows, label_key: labels}, protocol=2)
                self.images[side].append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                self.labels[side] += labels
        meta = self.dataset.meta
        names = [f"class {i}" for i in range(num_classes)]
        files[meta["filename"]] = pickle.dumps({meta["key"]: names}, protocol=2)

        def md5(content: bytes) -> str:
            return hashlib.md5(content).hexdigest()

        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for member, content in files.items():
                entry = tarfile.TarInfo(f"{self.dataset.base_folder}/{member}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        self.archive = packed.getvalue()
        monkeypatch.setattr(self.dataset, "tgz_md5", md5(self.archive))
        for attribute in ("train_list", "test_list"):
            members = [[member, md5(files[member])] for member, _ in getattr(self.dataset, attribute)]
            monkeypatch.setattr(self.dataset, attribute, members)
        monkeypatch.setattr(self.dataset, "meta", {**meta, "md5": md5(files[meta["filename"]])})
        # A port of this machine where nothing listens: a download fails at once and leaves the machine alone.
        monkeypatch.setattr(self.dataset, "url", f"http://127.0.0.1:9/{self.dataset.filename}")

    def write(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / self.dataset.filename).write_bytes(self.archive)


@pytest.fixture
def fake_cifar(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeCifar]:
    return lambda name: FakeCifar(name, monkeypatch)
