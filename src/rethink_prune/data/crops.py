"""Random crops as the paper has them, and GoogLeNet before (arXiv:1409.4842), drawn as torchvision draws them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_AREA = (0.08, 1.0)  # share of the image's area
_ASPECT = (3 / 4, 4 / 3)  # width by height
_ATTEMPTS = 10
CROP_DRAWS = 2 + 2 * _ATTEMPTS


class CropBox(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def place_crop(width: int, height: int, draws: Sequence[float]) -> CropBox:
    """Return the part of a training image to use: of 8 % to all of its area and of aspect 3/4 to 4/3.

    Parameters
    ----------
    width, height : int
        Of the image.
    draws : sequence of float
        :data:`CROP_DRAWS` numbers in [0, 1): where the part is, and area and aspect of ten attempts. If none of these
        fits in the image, the largest central part of an allowed aspect is taken.

    Examples
    --------
    >>> place_crop(100, 80, [0.5] * CROP_DRAWS)
    CropBox(left=17, top=7, width=66, height=66)
    """
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for attempt in range(_ATTEMPTS):
        area_draw, aspect_draw = draws[2 + 2 * attempt : 4 + 2 * attempt]
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area_draw)
        # Uniform in the logarithm, so that wide and high parts are equally likely.
        aspect = math.exp(low + (high - low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return CropBox(int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1)), w, h)
    w = min(width, max(1, round(height * _ASPECT[1])))
    h = min(height, max(1, round(width / _ASPECT[0])))
    return CropBox((width - w) // 2, (height - h) // 2, w, h)
