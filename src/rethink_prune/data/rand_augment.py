"""RandAugment: two operations on each image, drawn from torchvision's fourteen, all of one strength.

Cubuk et al. 2020 (arXiv:1909.13719). The operations, their strengths and their order are those of torchvision's
``RandAugment`` with bilinear interpolation, as its reference training of classifiers has it. That transform treats all
images of a call alike. Here each image has draws of its own, and images with the same draw go through it together.
"""

from functools import cache
from typing import Any

import torch

OPERATIONS = 14
_PER_IMAGE = 2
_STRENGTHS = 31  # from 0 to 30


def draw_operations(images: int, generator: torch.Generator) -> torch.Tensor:
    """Draw what is done to each image: int64, N x 2, the number of an operation doubled, and one more to negate it.

    Examples
    --------
    >>> draws = draw_operations(1000, torch.Generator().manual_seed(0))
    >>> tuple(draws.shape), int(draws.min()), int(draws.max())
    ((1000, 2), 0, 27)
    """
    return torch.randint(2 * OPERATIONS, (images, _PER_IMAGE), generator=generator)


def apply_operations(images: torch.Tensor, draws: torch.Tensor, *, magnitude: int) -> torch.Tensor:
    """Return augmented images: uint8, B x H x W x C, in and out.

    Parameters
    ----------
    images : torch.Tensor
        On any device.
    draws : torch.Tensor
        On the CPU: of each image, from `draw_operations`.
    magnitude : int
        Strength of the operations that have one, from 0 to 30.

    Examples
    --------
    >>> images = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)
    >>> apply_operations(images, torch.tensor([[0, 0], [12, 13]]), magnitude=9)[:, 0, 0, 0].tolist()  # 12: brighter
    [200, 185]
    """
    table = _table(magnitude, *images.shape[1:3])
    pixels = images.permute(0, 3, 1, 2).contiguous()
    for drawn in draws.T:
        # Sorted on the host, which then knows how many images have the same draw and need not ask the device.
        order = drawn.argsort(stable=True)
        numbers, counts = drawn.unique(return_counts=True)
        groups = pixels.index_select(0, order.to(pixels.device)).split(counts.tolist())
        done = [_operate(group, *table[number]) for group, number in zip(groups, numbers.tolist(), strict=True)]
        pixels = torch.cat(done).index_select(0, order.argsort().to(pixels.device))
    return pixels.permute(0, 2, 3, 1).contiguous()


@cache
def _table(magnitude: int, height: int, width: int) -> list[tuple[str, float]]:
    """Return torchvision's name and strength of every draw, for images of this size."""
    operations = _rand_augment()._AUGMENTATION_SPACE
    assert len(operations) == OPERATIONS
    table = []
    for name, (strengths, has_sign) in operations.items():
        values = strengths(_STRENGTHS, height, width)
        value = 0.0 if values is None else float(values[magnitude])
        table += [(name, value), (name, -value if has_sign else value)]
    return table


def _operate(images: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    transform = _rand_augment()
    # torchvision has no public name for one of the operations.
    return transform._apply_image_or_video_transform(
        images, name, strength, interpolation=transform.interpolation, fill=transform._fill
    )


@cache
def _rand_augment() -> Any:
    from torchvision.transforms.v2 import InterpolationMode, RandAugment  # slow to import

    return RandAugment(interpolation=InterpolationMode.BILINEAR)
