from pathlib import Path

import pytest
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data import describe_dataset, load_dataset
from rethink_prune.errors import UserError

MODULE = """
import numpy as np
import torch

CLASSES = ["a", "b"]
IMAGES = np.arange(4 * 5 * 5 * 3, dtype=np.uint8).reshape(4, 5, 5, 3)
LABELS = np.array([0, 1, 0, 1])

def good(root, scale=1):
    images = IMAGES * scale
    images.flags.writeable = False
    return {"train": (images, LABELS), "test": (torch.from_numpy(IMAGES[:2]), [0, 1]), "classes": CLASSES}

def make(root, train=None, test=None, classes=CLASSES):
    cases = {
        None: (IMAGES, LABELS),
        "single": IMAGES,
        "floats": (IMAGES / 255, LABELS),
        "three_axes": (IMAGES[..., 0], LABELS),
        "few_labels": (IMAGES, LABELS[:3]),
        "float_labels": (IMAGES, LABELS / 2),
        "large_labels": (IMAGES, LABELS + 1),
        "empty": (IMAGES[:0], LABELS[:0]),
        "oblong": (IMAGES[:, :4], LABELS),
        "smaller": (IMAGES[:, :4, :4], LABELS),
        "grey": (IMAGES[..., :1], LABELS),
    }
    return {"train": cases[train], "test": cases[test], "classes": classes}

def wrong_keys(root):
    return {"train": (IMAGES, LABELS), "classes": CLASSES}
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_images.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_arrays_and_tensors_are_taken(tmp_path: Path) -> None:
    dataset = load_dataset(DatasetConfig(name="my_images:good", args={"scale": 2}), cache_dir=tmp_path)
    assert dataset.train.images.shape == (4, 5, 5, 3)
    assert dataset.train.images[0, 0, 1].tolist() == [6, 8, 10]
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.classes == ("a", "b")
    info = describe_dataset(DatasetConfig(name="my_images:good", train_limit=2))
    assert (info.train_images, info.test_images, info.image_size, info.num_classes) == (2, 2, 5, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"classes": ["a"]}, "classes must be at least two different names, not ['a']"),
        ({"classes": ["a", "a"]}, "classes must be at least two different names, not ['a', 'a']"),
        ({"train": "single"}, "train: must be a pair of images and labels"),
        (
            {"train": "floats"},
            "train: images must be uint8, N x H x W x C, not float64 of shape (4, 5, 5, 3)",
        ),
        ({"test": "three_axes"}, "test: images must be uint8, N x H x W x C, not uint8 of shape (4, 5, 5)"),
        ({"train": "few_labels"}, "train: labels must be 4 integers, not int64 of shape (3,)"),
        ({"train": "float_labels"}, "train: labels must be 4 integers, not float64 of shape (4,)"),
        ({"train": "large_labels"}, "train: labels must be in [0, 2), not up to 2"),
        ({"test": "empty"}, "test: has no images"),
        ({"train": "oblong", "test": "oblong"}, "images must be square, not 4 x 5"),
        ({"test": "smaller"}, "train images are 5 x 5 x 3, but test images are 4 x 4 x 3"),
    ],
)
def test_what_breaks_the_contract_is_named(args: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        describe_dataset(DatasetConfig(name="my_images:make", args=args))
    assert str(error.value) == f"dataset.name=my_images:make: {message}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "dataset.image_size=16: my_images:make gives 5 x 5; set it to null"),
        (
            {"args": {"train": "grey", "test": "grey"}},
            "dataset.channels=3: my_images:make gives 1; set dataset.channels=1",
        ),
        (
            {"args": {"size": 3}},
            "dataset.args={'size': 3}: my_images:make is called with these and root: "
            "got an unexpected keyword argument 'size'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        describe_dataset(DatasetConfig(name="my_images:make", **options))  # type: ignore[arg-type]
    assert str(error.value) == message


def test_factory_that_returns_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="must return a mapping with train, test and classes"):
        describe_dataset(DatasetConfig(name="my_images:wrong_keys"))
