"""Decode one image, from the bytes of its file: whole, a random part of it, or its centre.

Random crops are those of the paper, and of GoogLeNet before (arXiv:1409.4842), drawn as torchvision draws them.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
_MODES = {1: "L", 3: "RGB"}
_RGB = 3  # torchvision's ImageReadMode.RGB
# The scale of tests: of an image whose shorter side is 256, the central 224.
_MARGIN = 256 / 224
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


class WrongSizeError(ValueError):
    """An image of another size than the rest, where none was asked for."""


def describe_failure(error: Exception) -> str:
    """Say in a few words why an image cannot be read.

    Examples
    --------
    >>> describe_failure(UnidentifiedImageError("cannot identify image file <_io.BytesIO object at 0x7f>"))
    'not an image'
    """
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


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


def read_square(content: Pixels, size: int, *, resize: bool, channels: int) -> Pixels:
    """Decode an image to uint8, size x size x channels.

    With `resize`, its shorter side is scaled to `size` (bilinear, antialiased) and the centre is cut out. Without, it
    must have that size; otherwise :class:`WrongSizeError` is raised.
    """
    with Image.open(io.BytesIO(content.data)) as image:
        if not resize and image.size != (size, size):
            raise WrongSizeError(f"{image.width} x {image.height}")
        pixels = _convert(image, channels)
    if resize:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(size, size, channels)


def read_whole(content: Pixels) -> torch.Tensor:
    """Decode an image whole, to uint8, 3 x H x W."""
    with Image.open(io.BytesIO(content.data)) as image:
        return _decode_opened(image, content, whole=True).permute(2, 0, 1).contiguous()


def read_crop(content: Pixels, size: int, choose: Callable[[int, int], CropBox]) -> torch.Tensor:
    """Decode the part of an image that `choose` says for its width and height, resized to uint8, size x size x 3."""
    with Image.open(io.BytesIO(content.data)) as image:
        width, height = image.size
        box = choose(width, height)
        # Where the part is at least twice as wide and as high as it will be, a JPEG is decoded at a half, a quarter or
        # an eighth of its size, which costs as much less. The part then begins and ends at whole pixels of that size.
        image.draft(None, (math.ceil(width * size / box.width), math.ceil(height * size / box.height)))
        pixels = _decode_opened(image, content, whole=image.size == (width, height))
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    left, top = round(box.left * across), round(box.top * down)
    right, bottom = round((box.left + box.width) * across), round((box.top + box.height) * down)
    return _resize(pixels[top : max(top + 1, bottom), left : max(left + 1, right)], height=size, width=size)


def read_centre(content: Pixels, size: int) -> torch.Tensor:
    """Decode an image whole, resize its shorter side to 256 and cut out the central 224, or in that proportion."""
    with Image.open(io.BytesIO(content.data)) as image:
        # Not at a fraction of its size: tests see exactly what everybody else's see.
        pixels = _decode_opened(image, content, whole=True)
    shape = pixels.shape[:2]
    height, width = (round(size * _MARGIN) * length // min(shape) for length in shape)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(pixels, height=height, width=width)[top : top + size, left : left + size]


@cache
def jpeg_decoder() -> Callable[..., torch.Tensor] | None:
    """Return torchvision's decoder, a tenth faster than Pillow's; None for versions that have it no longer."""
    try:
        import torchvision.io  # noqa: F401  registers the operator; takes seconds to import

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None


def _decode_opened(image: Image.Image, content: Pixels, *, whole: bool) -> torch.Tensor:
    """Decode an image that Pillow has opened to uint8, H x W x 3."""
    decoder = jpeg_decoder()
    if whole and decoder is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
        return decoder(torch.from_numpy(content), _RGB, False).permute(1, 2, 0)
    return torch.from_numpy(np.array(_convert(image, 3)))


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Decode an opened image of any kind and return it in colour (3 channels) or grey (1)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
    if image.mode == _MODES[channels]:
        image.load()  # to convert it would copy it
        return image
    return image.convert(_MODES[channels])


def _resize(pixels: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    # Torch's resize does the arithmetic of Pillow's with vector instructions, several times as fast. The batch's
    # dimension comes before the change of order: otherwise the result is channels-first, and copied slowly.
    images = pixels.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)
