from pathlib import Path

import pytest

from rethink_prune.data import DatasetInfo, describe_dataset, load_dataset
from rethink_prune.errors import UserError


def test_description_needs_no_files(tmp_path: Path) -> None:
    assert describe_dataset("imagenet", root=str(tmp_path / "nothing")) == DatasetInfo(
        name="imagenet",
        num_classes=1000,
        train_images=1_281_167,
        validation_images=0,
        test_images=50_000,
        channels=3,
        image_size=224,
    )


def test_size_and_subsets_can_be_chosen() -> None:
    info = describe_dataset("imagenet", image_size=64, train_limit=100_000, test_limit=10_000)
    assert (info.image_size, info.train_images, info.test_images) == (64, 100_000, 10_000)


def test_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"dataset\.channels=1: imagenet images have 3 channels"):
        describe_dataset("imagenet", channels=1)


def test_loading_says_that_only_planning_works(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^dataset\.name=imagenet: training .* not available yet; dry_run=true plans"):
        load_dataset("imagenet", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
