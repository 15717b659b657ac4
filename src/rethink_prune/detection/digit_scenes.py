"""Scenes made of handwritten digits: a small detection set that needs no download.

Two to five of scikit-learn's digits, 14 to 40 pixels high, stand on a dark and slightly noisy canvas. They overlap
little: by a tenth of the smaller one at most. A box is as tight as the ink allows. Training digits stand in training
scenes, test digits in test scenes.

The scenes are a data set, not a draw of a study: their seed is fixed. Each is drawn by itself, so more of them leave
the first ones as they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from rethink_prune.config import DatasetConfig, TransferConfig
from rethink_prune.data.source import AnyImages, ImageArray
from rethink_prune.data.sources import find_source
from rethink_prune.detection.pictures import Objects
from rethink_prune.seeds import derive_generator

_SEED = 0
_FEWEST, _MOST = 2, 5  # digits in a scene
_SMALLEST, _LARGEST = 14, 40  # pixels
_NOISE = 32  # grey values of the canvas are below it
_INK = 64  # grey value from which a pixel belongs to a digit
_DIMMEST = 0.6  # of a digit's brightness
_OVERLAP = 0.1  # share of the smaller box
_ATTEMPTS = 100  # places that are tried in a scene

_Grey = npt.NDArray[np.uint8]
_Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class DigitScenes:
    """Scenes in memory.

    Attributes
    ----------
    canvases : torch.Tensor
        uint8, N x size x size: grey values.
    contents : tuple of Objects
        What is in each.
    fingerprint : str
        SHA-256 of the scenes and their boxes.
    """

    canvases: torch.Tensor
    contents: tuple[Objects, ...]
    fingerprint: str
    classes: tuple[str, ...] = tuple("0123456789")

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.contents)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every scene."""
        _, height, width = self.canvases.shape
        return ((height, width),) * len(self)

    def picture(self, index: int) -> torch.Tensor:
        """Return a scene: uint8, 3 x size x size, the grey value in all channels."""
        return self.canvases[index].repeat(3, 1, 1)

    def objects(self, index: int) -> Objects:
        """Return the digits in it; digit k has the label k + 1."""
        return self.contents[index]


def make_digit_scenes(config: TransferConfig) -> tuple[DigitScenes, DigitScenes]:
    """Return the scenes to train on, ``config.scenes`` of them, and ``config.test_scenes`` to test with.

    Examples
    --------
    >>> train, test = make_digit_scenes(TransferConfig(name="digit_scenes", epochs=1, lr=0.01, scenes=2, test_scenes=1))
    >>> train.objects(0).labels.tolist(), train.objects(0).boxes[0].tolist()
    ([1, 8, 2, 8, 10], [36.0, 25.0, 54.0, 52.0])
    """
    # At their own size, 8 x 8: each is enlarged as a scene needs it.
    options = DatasetConfig.model_validate({"name": "digits", "image_size": 8, "channels": 1})
    digits = find_source(options).load()
    size = config.picture_size
    return _make_side("train", digits.train, config.scenes, size), _make_side(
        "test", digits.test, config.test_scenes, size
    )


def _make_side(side: str, digits: AnyImages, count: int, size: int) -> DigitScenes:
    assert isinstance(digits, ImageArray)  # for mypy: they come with scikit-learn
    scenes = [_draw_scene(side, index, digits, size) for index in range(count)]
    canvases = torch.stack([canvas for canvas, _ in scenes])
    contents = tuple(objects for _, objects in scenes)
    digest = hashlib.sha256(repr(tuple(canvases.shape)).encode() + canvases.numpy().tobytes())
    for objects in contents:
        digest.update(repr((objects.labels.tolist(), objects.boxes.tolist())).encode())
    return DigitScenes(canvases, contents, digest.hexdigest())


def _draw_scene(side: str, index: int, digits: ImageArray, size: int) -> tuple[torch.Tensor, Objects]:
    """Return the canvas (uint8, size x size) of one scene, and what is on it."""
    generator = derive_generator(_SEED, f"scenes/{side}", index)
    canvas = torch.randint(_NOISE, (size, size), generator=generator, dtype=torch.uint8).numpy()
    wanted = int(torch.randint(_FEWEST, _MOST + 1, (), generator=generator))
    draws = torch.rand(_ATTEMPTS, 5, generator=generator, dtype=torch.float64)
    boxes: list[_Box] = []
    labels: list[int] = []
    for which, length_draw, across, down, bright in draws.tolist():
        length = _SMALLEST + int(length_draw * (_LARGEST - _SMALLEST + 1))
        left, top = int(across * (size - length + 1)), int(down * (size - length + 1))
        position = int(which * len(digits))
        digit = _enlarge(digits.images[position, :, :, 0].numpy(), length)
        box = _find_ink(digit, left, top)
        if any(_overlap_too_much(box, other) for other in boxes):
            continue
        # In whole numbers, so that every machine makes the same bytes. Where digits meet, the brighter pixel is seen.
        weight = int(256 * (_DIMMEST + (1 - _DIMMEST) * bright))
        part = canvas[top : top + length, left : left + length]
        np.maximum(part, (digit.astype(np.uint16) * weight // 256).astype(np.uint8), out=part)
        boxes.append(box)
        labels.append(int(digits.labels[position]) + 1)
        if len(boxes) == wanted:
            break
    nothing_difficult = torch.zeros(len(boxes), dtype=torch.bool)
    objects = Objects(torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels), nothing_difficult)
    return torch.from_numpy(canvas), objects


def _enlarge(digit: _Grey, length: int) -> _Grey:
    return np.asarray(Image.fromarray(digit).resize((length, length), Image.Resampling.BILINEAR))


def _find_ink(digit: _Grey, left: int, top: int) -> _Box:
    """Return the edges of a digit's ink, where the digit's own corner is at `left` and `top`."""
    rows, columns = (np.flatnonzero((digit >= _INK).any(axis=axis)) for axis in (1, 0))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _overlap_too_much(a: _Box, b: _Box) -> bool:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width > 0 and height > 0 and width * height > _OVERLAP * smaller
