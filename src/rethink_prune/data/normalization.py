"""Mean and standard deviation of images, and the network's input that is made with them."""

import math
from collections.abc import Sequence

import torch

from rethink_prune.data.source import Statistics

# Images (float32, B x C x H x W, normalised, in channels_last memory) and labels (int64, B). Mixed images have shares
# of classes (float32, B x classes), and may lie in another memory format.
Batch = tuple[torch.Tensor, torch.Tensor]
_IMAGES_AT_ONCE = 256  # counting takes a copy of them


def channel_statistics(images: torch.Tensor) -> Statistics:
    """Return mean and standard deviation per channel of uint8 images (N x H x W x C), on the [0, 1] scale.

    Examples
    --------
    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    # Counted in whole numbers: sums of floats would depend on the order of the images and on the machine, and stage
    # keys depend on the result.
    counts = torch.zeros(images.shape[3], 256, dtype=torch.int64)
    for some in images.split(_IMAGES_AT_ONCE):
        counts += torch.stack([some[..., channel].flatten().bincount(minlength=256) for channel in range(len(counts))])
    number, values = images[..., 0].numel(), torch.arange(256)
    totals, squares = (counts @ values).tolist(), (counts @ values**2).tolist()
    # Python's integers, which do not overflow where these products do.
    deviations = [math.sqrt(number * s - t * t) for t, s in zip(totals, squares, strict=True)]
    return tuple(t / (255 * number) for t in totals), tuple(d / (255 * number) for d in deviations)


class Normalization:
    """Turns bytes into the network's input: ``(x / 255 - mean) / std``, float32, channels last.

    Parameters
    ----------
    mean, std : sequence of float
        One value per channel, on the [0, 1] scale.
    image_size : int
        Width in pixels.
    device : torch.device
        Where the images are.

    Examples
    --------
    >>> normalize = Normalization([0.5], [0.25], image_size=2, device=torch.device("cpu"))
    >>> normalize(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)).flatten().tolist()
    [-2.0, 2.0]
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, image_size: int, device: torch.device) -> None:
        self.device = device
        # One value per entry of a pixel row, not per channel: a last axis of 3 is too short to vectorise.
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).repeat(image_size)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).repeat(image_size)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8, N x H x W x C, to float32, N x C x H x W in channels_last memory."""
        rows = images.flatten(2).to(torch.float32)
        rows.div_(255).sub_(self._mean).div_(self._std)
        return rows.view(images.shape).permute(0, 3, 1, 2)
