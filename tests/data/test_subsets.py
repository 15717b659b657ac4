from typing import Any

import pytest
import torch

from rethink_prune.config import DatasetConfig
from rethink_prune.data.subsets import choose_subsets, count_subsets
from rethink_prune.errors import UserError


def options(**values: Any) -> DatasetConfig:
    return DatasetConfig(name="any", **values)


LABELS = torch.tensor([0, 1, 2] * 20)


def test_everything_by_default() -> None:
    chosen = choose_subsets(options(), LABELS, LABELS[:9], 3)
    assert chosen.train.tolist() == list(range(60))
    assert chosen.validation.tolist() == []
    assert chosen.test.tolist() == list(range(9))


@pytest.mark.parametrize("limit", [1, 2, 10, 59, 60])
def test_limit_takes_so_many_in_balance(limit: int) -> None:
    chosen = choose_subsets(options(train_limit=limit, test_limit=limit), LABELS, LABELS, 3)
    for positions in (chosen.train, chosen.test):
        counts = torch.bincount(LABELS[positions], minlength=3)
        assert len(positions) == limit == len(positions.unique())
        assert counts.max() - counts.min() <= 1


def test_small_class_gives_all_and_others_make_up() -> None:
    assert sorted(count_subsets(options(train_limit=20), [2, 50, 50], [1, 1, 1]).train) == [2, 9, 9]
    assert sorted(count_subsets(options(train_limit=101), [2, 50, 50], [1, 1, 1]).train) == [2, 49, 50]


def test_seed_decides_which() -> None:
    first, again, other = (
        choose_subsets(options(train_limit=15, split_seed=seed), LABELS, LABELS, 3).train.tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_validation_is_stratified_and_comes_before_the_limit() -> None:
    chosen = choose_subsets(options(validation=0.25, train_limit=45), LABELS, LABELS, 3)
    assert torch.bincount(LABELS[chosen.validation]).tolist() == [5, 5, 5]
    assert sorted(chosen.train.tolist() + chosen.validation.tolist()) == list(range(60))
    # A smaller training set is validated on the same images.
    smaller = choose_subsets(options(validation=0.25, train_limit=9), LABELS, LABELS, 3)
    assert torch.equal(smaller.validation, chosen.validation)
    assert not set(smaller.train.tolist()) & set(smaller.validation.tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_limit": 61}, "dataset.train_limit=61: there are only 60 train images"),
        ({"train_limit": 60, "validation": 0.1}, "dataset.train_limit=60: there are only 54 train images"),
        ({"test_limit": 10}, "dataset.test_limit=10: there are only 9 test images"),
        ({"validation": 0.001}, "dataset.validation=0.001: holds out no image of 60"),
        ({"validation": 0.99}, "dataset.validation=0.99: leaves a class without training images"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        choose_subsets(options(**values), LABELS, LABELS[:9], 3)
    assert str(error.value) == message
