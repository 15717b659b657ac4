from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import configure
from rethink_prune.config import DatasetConfig
from rethink_prune.data import DatasetInfo, ImageDataset, describe_dataset, load_dataset
from rethink_prune.data.normalization import channel_statistics
from rethink_prune.errors import UserError


def describe(name: str, **options: Any) -> DatasetInfo:
    return describe_dataset(DatasetConfig(name=name, **options))


def load(name: str, *, cache_dir: Path, **options: Any) -> ImageDataset:
    return load_dataset(DatasetConfig(name=name, **options), cache_dir=cache_dir)


def test_digits_are_split_as_documented(tmp_path: Path) -> None:
    dataset = load("digits", cache_dir=tmp_path)
    assert dataset.train.images.shape == (1442, 16, 16, 3)
    assert dataset.test.images.shape == (355, 16, 16, 3)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.validation is None
    assert dataset.classes == tuple("0123456789")
    assert (dataset.train.images[..., 0] == dataset.train.images[..., 2]).all()
    both = torch.cat([dataset.train.labels, dataset.test.labels])
    assert torch.bincount(both).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_keep_their_pixels_at_their_own_size(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    dataset = load("digits", image_size=8, channels=1, cache_dir=tmp_path)
    # The first four zeros are training images, so the first image is the first.
    expected = np.rint(load_digits().images[0] * 255 / 16)
    assert np.array_equal(dataset.train.images[0, :, :, 0].numpy(), expected)


def test_digits_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    dataset = load("digits", cache_dir=tmp_path)
    assert dataset.fingerprint == "94c926150636ab987de5b1ae1ee599a2abeb84174362d60dd6ba196eeb109863"


@pytest.mark.parametrize(
    "options",
    [{}, {"train_limit": 95, "test_limit": 40, "validation": 0.2}, {"image_size": 20, "channels": 1}],
)
def test_description_agrees_with_what_is_loaded(tmp_path: Path, options: dict[str, int]) -> None:
    info = describe("digits", **options)
    dataset = load("digits", cache_dir=tmp_path, **options)
    assert info == DatasetInfo(
        name="digits",
        num_classes=len(dataset.classes),
        train_images=len(dataset.train),
        validation_images=len(dataset.validation or ()),
        test_images=len(dataset.test),
        channels=dataset.train.images.shape[3],
        image_size=dataset.train.images.shape[1],
    )
    assert dataset.train.images.is_contiguous()


def test_splits_do_not_overlap_and_keep_their_labels(tmp_path: Path) -> None:
    whole = load("digits", cache_dir=tmp_path)
    parts = load("digits", validation=0.2, cache_dir=tmp_path)
    assert parts.validation is not None
    known = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(whole.train.images, whole.train.labels, strict=True)
    }
    held, kept = (
        {(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)}
        for split in (parts.validation, parts.train)
    )
    assert held | kept == known
    assert not held & kept


def test_statistics_are_those_of_the_images_used(tmp_path: Path) -> None:
    dataset = load("digits", train_limit=100, cache_dir=tmp_path)
    pixels = dataset.train.images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-12)


def test_statistics_in_pieces_equal_those_of_the_whole() -> None:
    images = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8)  # more than one piece holds
    mean, std = channel_statistics(images)
    pixels = images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_given_statistics_are_used(tmp_path: Path) -> None:
    dataset = load("digits", mean=[0.1, 0.2, 0.3], std=[1, 2, 3], cache_dir=tmp_path)
    assert dataset.mean == (0.1, 0.2, 0.3)
    assert dataset.std == (1.0, 2.0, 3.0)


def test_fingerprint_covers_what_decides_results(tmp_path: Path) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"train_limit": 100},
        {"train_limit": 100, "split_seed": 1},
        {"test_limit": 100},
        {"validation": 0.1},
        {"image_size": 20},
        {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]},
        {"mean": [0.5, 0.5, 0.5], "std": [2.0, 2.0, 2.0]},
    ]
    prints = [load("digits", cache_dir=tmp_path, **options).fingerprint for options in variants]
    assert len(set(prints)) == len(variants)
    assert load("digits", split_seed=5, cache_dir=tmp_path).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mnist",
            {},
            "dataset.name=mnist: no such data set (your own: path.to.module:factory); known are digits, cifar10, "
            "cifar100, imagenet, folder, huggingface",
        ),
        ("digits", {"train_limit": 1443}, "dataset.train_limit=1443: there are only 1442 train images"),
        (
            "digits",
            {"args": {"a": 1}},
            "dataset.args={'a': 1}: only dataset.name=path.to.module:factory takes arguments",
        ),
        ("cifar10", {"image_size": 64}, "dataset.image_size=64: cifar10 images are 32 x 32; give 32 or null"),
        ("cifar100", {"channels": 1}, "dataset.channels=1: cifar100 images have 3 channels"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        describe(name, **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.image_size=0"], "dataset.image_size=0: must be greater than or equal to 1"),
        (["dataset.channels=2"], "dataset.channels=2: must be 1 or 3"),
        (["dataset=folder", "dataset.channels=4"], "dataset.channels=4: must be 1 or 3"),
        (["dataset.train_limit=0"], "dataset.train_limit=0: must be greater than or equal to 1"),
        (["dataset.validation=1.0"], "dataset.validation=1: must be less than 1"),
        (["dataset.validation=-0.1"], "dataset.validation=-0.1: must be greater than or equal to 0"),
        (["dataset.mean=[0.5]", "dataset.std=[0.5]"], "dataset: mean needs 3 value(s), one per channel; got 1"),
        (["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.5,0.5,0]"], "dataset.std.2=0: must be greater than 0"),
        (["dataset.std=[0.5,0.5,0.5]"], "dataset: mean and std go together: give both or neither"),
    ],
)
def test_options_that_no_data_set_takes_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        configure(*overrides)
    assert str(error.value) == message


def test_statistics_of_another_training_must_fit() -> None:
    options = DatasetConfig(name="digits")
    assert options.with_statistics([0.5] * 3, [0.25] * 3).mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError) as error:
        options.with_statistics([0.5], [0.25])
    assert str(error.value) == "dataset: mean needs 3 value(s), one per channel; got 1"


def test_a_constant_channel_has_no_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "black.py").write_text(
        "import numpy as np\n"
        "def make(root):\n"
        "    images = np.zeros((4, 2, 2, 3), dtype=np.uint8), [0, 1, 0, 1]\n"
        "    return {'train': images, 'test': images, 'classes': ['a', 'b']}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load("black:make", cache_dir=tmp_path)
    assert str(error.value) == (
        "dataset.name=black:make: a channel is the same in all training images; set dataset.std"
    )
