"""Pictures with what a detector finds in them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, make_grid

from rethink_prune.detection.batches import TestPictures
from rethink_prune.seeds import seeded
from rethink_prune.training.runtime import Runtime

_PICTURES, _SIDE, _SCORE = 4, 320, 0.5


@torch.no_grad()
def draw_detections(detector: nn.Module, pictures: TestPictures, classes: Sequence[str], *, runtime: Runtime) -> Tensor:
    """Return the first four test pictures with the boxes of a score from 0.5 in red, and those of the objects in white.

    Returns
    -------
    torch.Tensor
        uint8, 3 x H x W: the pictures side by side, each brought to 320 pixels.
    """
    detector.eval()
    drawn = []
    for images, targets in islice(iter(replace(pictures, batch_size=1)), _PICTURES):
        with seeded(0), runtime.autocast():
            (found,) = detector(images)
        picture, sure = images[0].cpu(), found["scores"] >= _SCORE
        scale = _SIDE / max(picture.shape[1:])
        height, width = (max(1, round(side * scale)) for side in picture.shape[1:])
        shown = F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0].mul(255).byte()
        names = [classes[label - 1] for label in found["labels"][sure].tolist()]
        shown = _draw(shown, targets[0]["boxes"].cpu() * scale, None, "white")
        shown = _draw(shown, found["boxes"][sure].float().cpu() * scale, names, "red")
        drawn.append(F.pad(shown, (0, _SIDE - width, 0, _SIDE - height)))
    return make_grid(drawn, nrow=_PICTURES)


def _draw(picture: Tensor, boxes: Tensor, labels: list[str] | None, colour: str) -> Tensor:
    # It warns of a picture without boxes.
    return draw_bounding_boxes(picture, boxes, labels, colors=colour, width=2) if len(boxes) else picture
