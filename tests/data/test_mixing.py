"""Mixed batches are torchvision's, and the same for any number of processes and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

from rethink_prune.data import ImageArray, TrainBatches
from rethink_prune.data.batches import Epoch, Shard
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.mixing import Mixing
from rethink_prune.data.normalization import Normalization
from rethink_prune.seeds import derive_seed, seeded

CLASSES = 5
NORMALIZE = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), image_size=6, device=torch.device("cpu"))
WAYS: dict[str, tuple[tuple[float, float], Callable[[], Any]]] = {
    "mixup": ((0.8, 0.0), lambda: MixUp(alpha=0.8, num_classes=CLASSES)),
    "cutmix": ((0.0, 1.0), lambda: CutMix(alpha=1.0, num_classes=CLASSES)),
    "both": (
        (0.8, 1.0),
        lambda: RandomChoice([MixUp(alpha=0.8, num_classes=CLASSES), CutMix(alpha=1.0, num_classes=CLASSES)]),
    ),
}


def make_batches(images: int, batch_size: int, mixup: float = 0.8, cutmix: float = 1.0, seed: int = 0) -> TrainBatches:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 6, 6, 3), dtype=torch.uint8, generator=generator)
    array = ImageArray(pixels, torch.arange(images) % CLASSES)
    mixing = Mixing(mixup, cutmix, CLASSES, seed)
    augmented = DeviceImages(array, NORMALIZE, pad=1, flip=True, seed=seed, rand_augment=9)
    return TrainBatches(augmented, batch_size, mixing=mixing)


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_mixed_as_torchvision_does_with_the_same_draws(way: str) -> None:
    alphas, transform = WAYS[way]
    batches = make_batches(43, 8, *alphas, seed=3)
    plain, changed = replace(batches, mixing=None).epoch(2), 0
    for step, ((images, shares), (unmixed, labels)) in enumerate(zip(batches.epoch(2), plain, strict=True)):
        with seeded(derive_seed(3, "mixing", 2, 8 * step)):
            expected, expected_shares = transform()(unmixed, labels)
        assert torch.equal(images, expected)
        assert torch.equal(shares, expected_shares)
        changed += not torch.equal(images, unmixed)
        torch.testing.assert_close(shares.sum(1), torch.ones(len(labels)))
    assert changed >= 3, "a box of CutMix can be empty"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_mixed_batch(way: str, world: int) -> None:
    batches = make_batches(22, 10, *WAYS[way][0])  # the last has two images, which all processes take
    parts = [batches.part(Shard(rank, world)) for rank in range(world)]
    for step, (batch, *shares) in enumerate(zip(batches.epoch(1), *(part.epoch(1) for part in parts), strict=True)):
        for together, divided in zip(batch, zip(*shares, strict=True), strict=True):
            assert torch.equal(torch.cat([together] * (world if step == 2 else 1)), torch.cat(divided))


def test_a_resumed_epoch_is_mixed_as_an_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(30, 8)
    whole, resumed = list(batches.epoch(4)), list(batches.epoch(4, start_step=2))
    monkeypatch.setattr(batches.images, "_at_once", 20)  # as on a GPU
    in_blocks = list(batches.epoch(4))
    for found, expected in ((resumed, whole[2:]), (in_blocks, whole)):
        for batch, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_each_batch_takes_one_of_two_ways_with_equal_chances() -> None:
    mixing = Mixing(1.0, 1.0, CLASSES, seed=0)
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 16, 16)  # of one value each
    blended, shares = 0, []
    for start in range(400):
        mixed, share = mixing(images, torch.arange(5), epoch=0, start=start)
        # Blended images have one value; where CutMix's box is empty as well, which is one of the images'.
        blended += bool((mixed[0] == mixed[0, 0, 0, 0]).all() and mixed[0, 0, 0, 0] not in (0.0, 1.0))
        shares.append(float(share[0, 1]))
    assert 160 < blended < 240
    assert len(set(shares)) > 200
    assert 0.4 < sum(shares) / 400 < 0.7


def test_draws_differ_between_epochs_and_seeds_and_leave_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = {
        tuple(Mixing(0.8, 0.0, 4, seed)(images, torch.arange(4), epoch=epoch, start=start)[1].flatten().tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for start in (0, 8)
    }
    assert len(found) == 8
    assert torch.equal(torch.rand(1), expected)


def test_pruners_see_images_of_one_class() -> None:
    batches = make_batches(30, 8)
    for (images, labels), (expected, _) in zip(Epoch(batches, 0), replace(batches, mixing=None).epoch(0), strict=True):
        assert torch.equal(images, expected)
        assert labels.dtype == torch.int64
