"""Where classifiers are split for detection: nothing of them is lost, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torchvision import models

from harness import Net, randomise
from rethink_prune.detection.split import split_classifier
from rethink_prune.errors import UserError
from rethink_prune.models import build_model

# Network, side of its images, stride, channels of the body, first layer of the head. Nothing pools after these bodies.
WHOLE: dict[str, tuple[Callable[[], nn.Module], int, int, int, str]] = {
    "resnet20": (partial(build_model, "resnet20"), 32, 2, 32, "layer3.0.conv1"),
    "vgg5": (partial(build_model, "vgg5"), 16, 4, 48, "classifier.0"),
    "vgg11": (partial(build_model, "vgg11"), 32, 16, 512, "classifier.0"),
    "preresnet20": (partial(build_model, "preresnet20"), 32, 4, 256, "fc"),
    "densenet40": (partial(build_model, "densenet40"), 16, 4, 456, "fc"),
    "resnet34": (partial(models.resnet34, num_classes=9), 64, 16, 256, "layer4.0.conv1"),
    "mobilenet_v2": (partial(models.mobilenet_v2, num_classes=9), 64, 16, 576, "features.14.conv.1.0"),
}


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", WHOLE)
def test_body_head_and_last_layer_are_the_classifier(name: str) -> None:
    build, side, stride, channels, reader = WHOLE[name]
    model = randomise(build())
    parts = split_classifier(model, (3, side, side), stride=stride, region_size=side // stride)
    assert (parts.channels, parts.feature_reader) == (channels, reader)
    x = images(side)
    with torch.no_grad():
        features = parts.body(x)
        logits = model.get_submodule(parts.classifier)(parts.head(features))
        assert features.shape == (2, channels, side // stride, side // stride)
        assert torch.allclose(logits, model(x), rtol=0, atol=1e-10)
        assert logits.std() > 1e-3, "the comparison is not of zeros"
        # The body takes pictures of any shape.
        assert parts.body(torch.zeros(1, 3, 64, 96, dtype=torch.float64)).shape[2:] == (64 // stride, 96 // stride)
    inside = {id(p) for part in (parts.body, parts.head) for p in part.parameters()}
    last = {id(p) for p in model.get_submodule(parts.classifier).parameters()}
    assert inside | last == {id(p) for p in model.parameters()}
    assert not inside & last


def vgg16() -> nn.Module:
    """Return torchvision's with fewer hidden features, which take seconds to draw."""
    with torch.device("meta"):
        model = models.vgg16()
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 9))
    return randomise(model.to_empty(device="cpu"))


def test_of_vgg_only_the_pooling_between_body_and_head_is_left_out() -> None:
    model = vgg16()
    parts = split_classifier(model, (3, 64, 64), stride=16)
    assert (parts.channels, parts.features, parts.feature_reader) == (512, 32, "classifier.0")
    with torch.no_grad():
        pooled = nn.functional.max_pool2d(parts.body(images(64)), 2)
        logits = model.classifier[3](parts.head(pooled))
        assert torch.allclose(logits, model(images(64)), rtol=0, atol=1e-10)
    assert parts.body(images(64)).shape[2:] == (4, 4)


def test_a_head_that_is_named_ends_there_and_is_averaged() -> None:
    model = randomise(models.resnet34(num_classes=9))
    by_name = split_classifier(model, (3, 64, 64), stride=16, body="layer3.5", head="layer4.0", region_size=4)
    pooled = split_classifier(model, (3, 64, 64), stride=16, head="pool", region_size=4)
    with torch.no_grad():
        features = by_name.body(images(64))
        assert torch.equal(by_name.head(features), model.layer4[0](features).mean((2, 3)))
        assert torch.equal(pooled.head(features), features.mean((2, 3)))
    assert (by_name.features, pooled.features) == (512, 256)
    # No layer reads the features but the one that is not there.
    assert pooled.feature_reader == pooled.classifier == "fc"


def no_linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def of_a_fixed_size() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 6)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 5))


def reads_the_picture_twice() -> nn.Module:
    return Net(
        lambda net, x: net.fc((net.b(net.a(x)) + net.c(x)).mean((2, 3))),
        a=nn.Conv2d(3, 4, 3, stride=2, padding=1),
        b=nn.Conv2d(4, 4, 3, padding=1),
        c=nn.Conv2d(3, 4, 1, stride=2),
        fc=nn.Linear(4, 5),
    )


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            partial(build_model, "resnet20"),
            {"stride": 8},
            "transfer.stride=8: ResNet has no features at that stride; it has some at 1, 2, 4$",
        ),
        (
            # Its last features have one size, 7 x 7 at last, whatever the picture's.
            partial(models.mobilenet_v2, num_classes=9),
            {"stride": 64},
            "transfer.stride=64: MobileNetV2 has no features at that stride; it has some at 2, 4, 8, 16, 32$",
        ),
        (
            partial(build_model, "resnet20"),
            {"stride": 2, "body": "layer9"},
            "transfer.body=layer9: ResNet has no such module",
        ),
        (
            partial(build_model, "resnet20"),
            {"stride": 2, "body": "layer3"},
            "transfer.body=layer3: is at stride 4 in ResNet, not at transfer.stride=2",
        ),
        (
            partial(build_model, "resnet20"),
            {"stride": 2, "body": "fc"},
            "transfer.body=fc: gives no features in space in ResNet, not at transfer.stride=2",
        ),
        (
            partial(build_model, "resnet20"),
            {"stride": 2, "head": "layer1"},
            "transfer.head=layer1: comes before the end of the body",
        ),
        (
            partial(build_model, "resnet20"),
            {"stride": 2, "head": "layer9"},
            "transfer.head=layer9: ResNet has no such module",
        ),
        (
            no_linear,
            {"stride": 2},
            "transfer: Sequential has no last linear layer, so it is not known where its features are",
        ),
        (
            of_a_fixed_size,
            {"stride": 4},
            "transfer.head: what follows the body does not take regions of 7 x 7; take transfer.head=pool, or name the "
            "module with which it should end",
        ),
        (
            reads_the_picture_twice,
            {"stride": 2, "body": "b"},
            "transfer.body=b: what follows reads other tensors as well; end the body elsewhere",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    build: Callable[[], nn.Module], options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as error:
        split_classifier(build().eval(), (3, 32, 32), **options)  # type: ignore[arg-type]
    assert f"{error.value}$".startswith(message)
    assert "\n" not in str(error.value)


def test_a_head_of_a_fixed_size_takes_regions_of_that_size_or_is_pooled() -> None:
    model = randomise(of_a_fixed_size())
    whole = split_classifier(model, (3, 32, 32), stride=4, region_size=8)
    pooled = split_classifier(model, (3, 32, 32), stride=4, head="pool")
    with torch.no_grad():
        assert torch.equal(model[5](whole.head(whole.body(images(32)))), model(images(32)))
    assert (whole.features, pooled.features) == (6, 4)
