"""The families of torchvision's networks, and how their constructors draw the weights."""

from __future__ import annotations

import sys

from torch import nn


def torchvision_initialiser(model: nn.Module) -> str | None:
    """Return the name of the initialiser of a network of torchvision, or None if `model` is of no known family.

    Examples
    --------
    >>> from torchvision.models import squeezenet1_1, vgg11
    >>> torchvision_initialiser(vgg11(num_classes=2))
    'torchvision_vgg'
    >>> torchvision_initialiser(squeezenet1_1(num_classes=2))
    """
    # Importing torchvision takes seconds. Where nobody has imported it, the network is not torchvision's.
    if "torchvision" not in sys.modules:
        return None
    from torchvision.models import VGG, MobileNetV2, MobileNetV3, ResNet

    # The exact class: one that is derived from a family may have layers that the family does not.
    if type(model) is ResNet:
        return "torchvision_resnet"
    return "torchvision_vgg" if type(model) in (VGG, MobileNetV2, MobileNetV3) else None
