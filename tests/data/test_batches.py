from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from rethink_prune.data import EvalBatches, ImageArray, TrainBatches, device_images
from rethink_prune.data.batches import Shard
from rethink_prune.data.device_images import DeviceImages, EpochDraws, draw_epoch
from rethink_prune.data.normalization import Normalization
from rethink_prune.errors import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def make_split(images: int, size: int = 6, channels: int = 3) -> ImageArray:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, size, size, channels), dtype=torch.uint8, generator=generator)
    return ImageArray(pixels, torch.arange(images))  # each label names its image


def make_images(split: ImageArray, device: torch.device = CPU, **options: Any) -> DeviceImages:
    channels, size = split.images.shape[3], split.images.shape[1]
    return DeviceImages(
        split, Normalization(MEAN[:channels], STD[:channels], image_size=size, device=device), **options
    )


def train_batches(split: ImageArray, batch_size: int = 4, **options: Any) -> TrainBatches:
    return TrainBatches(make_images(split, **{"pad": 2, "flip": True, "seed": 0, **options}), batch_size)


def whole_epoch(batches: TrainBatches, epoch: int, start_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches.epoch(epoch, start_step), strict=True)
    return torch.cat(images), torch.cat(labels)


def usual(image: torch.Tensor) -> torch.Tensor:
    """What ToTensor and Normalize make of an H x W x C image."""
    return tv.normalize(tv.to_tensor(image.numpy()), list(MEAN), list(STD))


@pytest.mark.parametrize("pad", [1, 2])
@pytest.mark.parametrize("flip", [True, False])
def test_every_outcome_equals_torchvisions(monkeypatch: pytest.MonkeyPatch, pad: int, flip: bool) -> None:
    # All draws that exist, each once, on the same image; torchvision crops first and mirrors then, so its
    # outcome with the same crop is ours with the mirrored offset.
    side = 2 * pad + 1
    flips = [False, True] if flip else [False]
    outcomes = [(y, x, f) for y in range(side) for x in range(side) for f in flips]
    top, left, mirrored = (torch.tensor(values) for values in zip(*outcomes, strict=True))
    count = len(outcomes)
    split = make_split(1)
    repeated = ImageArray(split.images.repeat(count, 1, 1, 1), torch.arange(count))
    draws = EpochDraws(torch.arange(count), top, left, mirrored)
    monkeypatch.setattr(device_images, "draw_epoch", lambda *args, **options: draws)
    ours, _ = whole_epoch(train_batches(repeated, pad=pad, flip=flip, batch_size=5), epoch=0)

    padded = tv.pad(split.images[0].permute(2, 0, 1), [pad])
    for got, (y, x, f) in zip(ours, outcomes, strict=True):
        crop = tv.crop(padded, y, 2 * pad - x if f else x, 6, 6)
        expected = usual((tv.hflip(crop) if f else crop).permute(1, 2, 0))
        assert torch.equal(got, expected)


def test_draws_are_uniform_and_independent() -> None:
    draws = draw_epoch(40_000, pad=4, flip=True, seed=0, epoch=0)
    cells = (draws.top * 9 + draws.left) * 2 + draws.flip
    assert scipy.stats.chisquare(torch.bincount(cells, minlength=162).numpy()).pvalue > 0.001


def test_distribution_is_that_of_the_usual_transforms() -> None:
    # Pixels that are all different show which crop was taken, and whether it was mirrored.
    image = np.zeros((2, 2), dtype=np.uint8)
    image[0, 0], image[0, 1], image[1, 0] = 200, 100, 50
    draws = 4_000
    usual_transforms = Compose([RandomCrop(2, padding=1), RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = [np.asarray(usual_transforms(Image.fromarray(image))).tobytes() for _ in range(draws)]
    repeated = torch.from_numpy(image).view(1, 2, 2, 1).repeat(draws, 1, 1, 1)
    split = ImageArray(repeated, torch.zeros(draws, dtype=torch.int64))
    normalize = Normalization((0.0,), (1.0,), image_size=2, device=CPU)
    batches = TrainBatches(DeviceImages(split, normalize, pad=1, flip=True, seed=0), batch_size=1000)
    ours = [
        np.rint(values.numpy() * 255).astype(np.uint8).tobytes() for images, _ in batches.epoch(0) for values in images
    ]
    outcomes = sorted(set(theirs) | set(ours))
    table = np.array([[side.count(outcome) for outcome in outcomes] for side in (theirs, ours)])
    assert scipy.stats.chi2_contingency(table).pvalue > 0.001


def test_output_is_float_channels_last() -> None:
    for split in (make_split(8), make_split(8, channels=1)):
        images, labels = next(train_batches(split).epoch(0))
        assert images.shape == (4, split.images.shape[3], 6, 6)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_without_augmentation_images_are_shuffled_but_unchanged() -> None:
    split = make_split(10)
    images, labels = whole_epoch(train_batches(split, pad=0, flip=False), epoch=0)
    assert labels.tolist() != list(range(10))
    assert sorted(labels.tolist()) == list(range(10))
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, usual(split.images[label]))


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False)])
def test_crop_and_flip_work_alone(pad: int, flip: bool) -> None:
    split = make_split(16)
    images, labels = whole_epoch(train_batches(split, pad=pad, flip=flip), epoch=0)
    unchanged = [torch.equal(image, usual(split.images[label])) for image, label in zip(images, labels, strict=True)]
    assert not all(unchanged)


def test_batches_do_not_depend_on_batch_size() -> None:
    split = make_split(20)
    images, labels = whole_epoch(train_batches(split, batch_size=4), epoch=3)
    for batch_size in (1, 5, 7, 20):
        others = whole_epoch(train_batches(split, batch_size=batch_size), epoch=3)
        assert torch.equal(images, others[0])
        assert torch.equal(labels, others[1])


@pytest.mark.parametrize("world", [1, 2])
def test_batches_do_not_depend_on_how_many_are_made_at_once(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = train_batches(make_split(22), batch_size=4)
    for rank in range(world):
        part = batches.part(Shard(rank, world))
        one_by_one = list(part.epoch(3))
        monkeypatch.setattr(batches.images, "_at_once", 10)
        in_blocks = list(part.epoch(3))
        monkeypatch.undo()
        assert len(in_blocks) == 6
        for (images, labels), (others, other_labels) in zip(one_by_one, in_blocks, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_resumed_epoch_goes_on_where_it_was() -> None:
    batches = train_batches(make_split(18))
    images, labels = whole_epoch(batches, epoch=2)
    later_images, later_labels = whole_epoch(batches, epoch=2, start_step=3)
    assert torch.equal(images[12:], later_images)
    assert torch.equal(labels[12:], later_labels)


def test_epochs_and_seeds_differ() -> None:
    split = make_split(32)
    orders = [
        whole_epoch(train_batches(split, seed=seed), epoch=epoch)[1].tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_partial_batch_is_kept_but_a_single_image_is_dropped() -> None:
    kept = train_batches(make_split(10))
    assert [len(labels) for _, labels in kept.epoch(0)] == [4, 4, 2]
    assert (kept.steps_per_epoch, kept.images_per_epoch) == (3, 10)
    dropped = train_batches(make_split(9))
    assert [len(labels) for _, labels in dropped.epoch(0)] == [4, 4]
    assert (dropped.steps_per_epoch, dropped.images_per_epoch) == (2, 8)
    singles = train_batches(make_split(3), batch_size=1)
    assert [len(labels) for _, labels in singles.epoch(0)] == [1, 1, 1]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("flip", [True, False])
def test_processes_share_every_batch(world: int, flip: bool) -> None:
    batches = train_batches(make_split(22), batch_size=10, flip=flip)  # the last has two images, which all take
    parts = [batches.part(Shard(rank, world)) for rank in range(world)]
    epochs = zip(batches.epoch(1), *(part.epoch(1) for part in parts), strict=True)
    for step, (batch, *shares) in enumerate(epochs):
        assert batches.size(step) == (10, 10, 2)[step]
        for together, divided in zip(batch, zip(*shares, strict=True), strict=True):
            whole = torch.cat([together] * (world if step == 2 else 1))
            assert torch.equal(whole, torch.cat(divided))


def test_processes_share_evaluation() -> None:
    batches = EvalBatches(make_images(make_split(13)), batch_size=4)
    parts = [batches.part(Shard(rank, 3)) for rank in range(3)]
    assert {len(part) for part in parts} == {13}
    assert torch.cat([labels for part in parts for _, labels in part]).tolist() == list(range(13))


def test_single_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe\.batch_size=4: cannot train on a single image"):
        train_batches(make_split(1))


def test_evaluation_sees_every_image_once_in_order() -> None:
    split = make_split(9)
    batches = EvalBatches(make_images(split), batch_size=4)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) == 9
    assert torch.equal(labels, split.labels)
    assert torch.equal(images, torch.stack([usual(image) for image in split.images]))


@pytest.mark.cuda
def test_epoch_on_cuda_equals_cpu_and_never_waits() -> None:
    split = make_split(50)
    expected, expected_labels = whole_epoch(train_batches(split), epoch=1)
    batches = train_batches(split, device=torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = whole_epoch(batches, epoch=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-6)
    assert torch.equal(labels.cpu(), expected_labels)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 2, 5, 6, 13, 14, 64])
def test_weighted_means_of_all_processes_are_the_mean_of_the_batch(world: int, images: int) -> None:
    values = torch.randn(images, dtype=torch.float64, generator=torch.Generator().manual_seed(images))
    means, counted = [], 0.0
    for rank in range(world):
        shard = Shard(rank, world)
        part = values[shard.of_batch(0, images)]
        assert len(part) >= min(2, images)  # what batch normalisation needs
        means.append(shard.weight(len(part), images) * part.mean())
        counted += len(part) / shard.copies(images)
    assert torch.stack(means).mean().item() == pytest.approx(values.mean().item(), abs=1e-12)
    assert counted == pytest.approx(images)
