from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rethink_prune.data import DatasetInfo, describe_dataset, load_dataset
from rethink_prune.data.dataset import channel_statistics
from rethink_prune.errors import UserError

CONFIGS = Path(__file__).parents[2] / "conf/dataset"


def test_digits_are_split_as_documented(tmp_path: Path) -> None:
    dataset = load_dataset("digits", cache_dir=tmp_path)
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

    dataset = load_dataset("digits", image_size=8, channels=1, cache_dir=tmp_path)
    # The first four zeros are training images, so the first image is the first.
    expected = np.rint(load_digits().images[0] * 255 / 16)
    assert np.array_equal(dataset.train.images[0, :, :, 0].numpy(), expected)


def test_digits_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    dataset = load_dataset("digits", cache_dir=tmp_path)
    assert dataset.fingerprint == "94c926150636ab987de5b1ae1ee599a2abeb84174362d60dd6ba196eeb109863"


@pytest.mark.parametrize(
    "options",
    [{}, {"train_limit": 95, "test_limit": 40, "validation": 0.2}, {"image_size": 20, "channels": 1}],
)
def test_description_agrees_with_what_is_loaded(tmp_path: Path, options: dict[str, int]) -> None:
    info = describe_dataset("digits", **options)  # type: ignore[arg-type]
    dataset = load_dataset("digits", cache_dir=tmp_path, **options)  # type: ignore[arg-type]
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
    whole = load_dataset("digits", cache_dir=tmp_path)
    parts = load_dataset("digits", validation=0.2, cache_dir=tmp_path)
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
    dataset = load_dataset("digits", train_limit=100, cache_dir=tmp_path)
    pixels = dataset.train.images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(0), rtol=1e-12)


def test_statistics_in_pieces_equal_those_of_the_whole() -> None:
    images = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8)  # more pixels than one piece holds
    mean, std = channel_statistics(images)
    pixels = images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_given_statistics_are_used(tmp_path: Path) -> None:
    dataset = load_dataset("digits", mean=[0.1, 0.2, 0.3], cache_dir=tmp_path)
    assert dataset.mean == (0.1, 0.2, 0.3)
    assert dataset.std == load_dataset("digits", cache_dir=tmp_path).std


def test_fingerprint_covers_what_decides_results(tmp_path: Path) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"train_limit": 100},
        {"train_limit": 100, "split_seed": 1},
        {"test_limit": 100},
        {"validation": 0.1},
        {"image_size": 20},
        {"std": [1.0, 1.0, 1.0]},
    ]
    prints = [load_dataset("digits", cache_dir=tmp_path, **options).fingerprint for options in variants]  # type: ignore[arg-type]
    assert len(set(prints)) == len(variants)
    assert load_dataset("digits", split_seed=5, cache_dir=tmp_path).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mnist",
            {},
            "dataset.name=mnist: unknown; choose digits, cifar10, cifar100, imagenet, folder or path.to.module:factory",
        ),
        ("digits", {"image_size": 0}, "dataset.image_size=0: must be at least 1"),
        ("digits", {"channels": 2}, "dataset.channels=2: digits come with 1 or 3 channels"),
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
        describe_dataset(name, **options)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "dataset.mean=[0.5]: needs 3 values, one per channel"),
        ({"std": [0.5, 0.5, 0]}, "dataset.std=[0.5, 0.5, 0]: must be positive"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, list[float]], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_dataset("digits", cache_dir=tmp_path, **options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_configs_have_the_same_keys_and_describe_themselves() -> None:
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert set(configs) == {"digits", "cifar10", "cifar100", "imagenet", "folder"}
    assert len({tuple(config) for config in configs.values()}) == 1
    for name, config in configs.items():
        assert config["name"] == name
        options = {k: v for k, v in config.items() if k not in ("name", "mean", "std", "pad", "flip", "workers")}
        if name != "folder":
            assert describe_dataset(name, **options).image_size == config["image_size"]
