"""RandAugment: each image has operations of its own, which are torchvision's."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from rethink_prune.data.rand_augment import OPERATIONS, apply_operations, draw_operations
from rethink_prune.seeds import seeded

NAMES = list(RandAugment._AUGMENTATION_SPACE)


def pictures(count: int, size: int = 16, channels: int = 3) -> torch.Tensor:
    """Return smooth images: uint8, N x H x W x C."""
    rough = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(rough, size=size, mode="bilinear")
    return (smooth * 200 + 20).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def outcomes(transform: Any, picture: torch.Tensor, tries: int) -> list[bytes]:
    found = []
    for seed in range(tries):
        with seeded(seed):
            found.append(transform(picture.permute(2, 0, 1)).permute(1, 2, 0).contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(OPERATIONS), ids=NAMES)
def test_every_operation_is_torchvisions(number: int, channels: int) -> None:
    name = NAMES[number]

    class Alone(RandAugment):
        _AUGMENTATION_SPACE = {name: RandAugment._AUGMENTATION_SPACE[name]}  # noqa: RUF012

    # A size that is no power of two, and other images beside it.
    images = pictures(5, size=11, channels=channels)
    for magnitude in (1, 9, 30):
        theirs = outcomes(Alone(1, magnitude, interpolation=InterpolationMode.BILINEAR), images[3], tries=12)
        draws = torch.zeros(5, 2, dtype=torch.int64)
        ours = set()
        for code in (2 * number, 2 * number + 1):
            draws[1:, 1] = code  # the first operation is Identity
            ours.add(apply_operations(images, draws, magnitude=magnitude)[3].numpy().tobytes())
        assert ours == set(theirs)


def test_two_operations_follow_each_other_and_each_image_has_its_own() -> None:
    images, draws = pictures(40), draw_operations(40, torch.Generator().manual_seed(1))
    together = apply_operations(images, draws, magnitude=9)
    for image, (first, second), found in zip(images, draws.tolist(), together, strict=True):
        once = apply_operations(image[None], torch.tensor([[first, 0]]), magnitude=9)
        twice = apply_operations(once, torch.tensor([[second, 0]]), magnitude=9)
        assert torch.equal(found, twice[0])
    assert together.shape == images.shape
    assert together.is_contiguous()


def test_the_distribution_is_that_of_the_usual_transform() -> None:
    draws = draw_operations(40_000, torch.Generator().manual_seed(0))
    cells = torch.bincount(draws[:, 0] * 2 * OPERATIONS + draws[:, 1], minlength=4 * OPERATIONS**2)
    assert scipy.stats.chisquare(cells.numpy()).pvalue > 0.001
    picture, tries = pictures(1)[0], 1500
    usual = RandAugment(1, 9, interpolation=InterpolationMode.BILINEAR)
    theirs = outcomes(usual, picture, tries)
    draws = torch.stack([draws[:tries, 0], torch.zeros(tries, dtype=torch.int64)], 1)
    images = picture.expand(tries, -1, -1, -1)
    ours = [image.numpy().tobytes() for image in apply_operations(images, draws, magnitude=9)]
    kinds = sorted({*theirs, *ours})
    table = [[side.count(kind) for kind in kinds] for side in (theirs, ours)]
    assert len(kinds) > 18
    assert scipy.stats.chi2_contingency(table).pvalue > 0.001
