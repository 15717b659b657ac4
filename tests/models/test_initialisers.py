"""Initialisations: which one each family has, and what it draws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rethink_prune import build_model
from rethink_prune.models import MODELS
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.models.resnet import ResNet
from rethink_prune.seeds import seeded

SMALL_VIT = """
from torchvision.models import VisionTransformer
def small(num_classes):
    return VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=512, mlp_dim=1024, num_classes=num_classes)
"""


def test_vgg_initialisation() -> None:
    model = build_model("vgg16")
    with seeded(0):
        INITIALISERS["cifar_vgg"](model)
    conv = model.get_submodule("features.24")
    assert isinstance(conv, nn.Conv2d)
    assert conv.out_channels == 512
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 0.5).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm1d):
            assert (module.weight == 1).all()
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert (module.bias == 0).all()


def test_resnet_initialisation() -> None:
    model = build_model("resnet56")
    with seeded(0):
        INITIALISERS["cifar_resnet"](model)
    weight = model.get_parameter("layer3.4.conv2.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert (model.get_parameter("layer3.4.bn2.weight") == 1).all()
    assert model.get_parameter("fc.weight").abs().max() <= 1 / math.sqrt(64)
    assert model.get_parameter("fc.weight").abs().max() > 0.9 / math.sqrt(64)


def test_initialisation_of_slimming_networks() -> None:
    model = build_model("densenet40")
    with seeded(0):
        INITIALISERS["cifar_resnet_half_gamma"](model)
    assert model.get_parameter("transition2.2.weight").std().item() == pytest.approx(math.sqrt(2 / 312), rel=0.02)
    assert all((m.weight == 0.5).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))

    # As VGG-11 of ImageNet, but small.
    vgg = nn.Sequential(nn.Conv2d(3, 512, 3), nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64))
    with seeded(0):
        INITIALISERS["slimming_vgg"](vgg)
    assert vgg.get_parameter("0.weight").std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.02)
    assert vgg.get_parameter("3.weight").std().item() == pytest.approx(0.01, rel=0.02)
    assert (vgg.get_parameter("1.weight") == 0.5).all()
    assert (vgg.get_parameter("4.weight") == 0.5).all()


def test_initialisation_of_unstructured_vgg() -> None:
    model = build_model("vgg11", head="linear", conv_bias=True)
    with seeded(0):
        INITIALISERS["cifar_vgg_fan_in"](model)
    weight = model.get_parameter("features.8.weight")
    assert weight.shape[:2] == (256, 128)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    assert (model.get_parameter("features.8.bias") == 0).all()
    assert (model.get_parameter("features.9.weight") == 1).all()
    assert model.get_parameter("classifier.0.weight").std().item() == pytest.approx(0.01, rel=0.05)


def test_initialisation_over_fan_in() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3, groups=4), nn.BatchNorm2d(128), nn.Flatten(), nn.Linear(128, 200))
    with seeded(0):
        INITIALISERS["kaiming_fan_in"](model)
    assert model.get_parameter("0.weight").std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.02)
    assert model.get_parameter("3.weight").std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert (model.get_parameter("3.bias") == 0).all()
    assert (model.get_parameter("1.weight") == 1).all()


@pytest.mark.parametrize(
    "name",
    [
        *("torchvision.models:resnet18", "torchvision.models:mobilenet_v2", "torchvision.models:mobilenet_v3_small"),
        *("torchvision.models:swin_t", "torchvision.models:convnext_tiny", "timm.models:convnext_atto"),
        *("torchvision.models:swin_v2_t", "timm.models:vit_tiny_patch16_224"),
        # As vit_b_16, but small.
        "rethink_vit:small",
    ],
)
def test_networks_are_drawn_as_their_constructors_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("timm."):
        pytest.importorskip("timm")
    (tmp_path / "rethink_vit.py").write_text(SMALL_VIT)
    monkeypatch.chdir(tmp_path)
    with seeded(1):
        model = build_model(name)
    theirs = {key: tensor.clone() for key, tensor in model.named_parameters()}
    with seeded(0):
        INITIALISERS[family_initialiser(model) or ""](model)
    for key, ours in model.named_parameters():
        # The class token of a ViT has as many numbers as tokens have features.
        if theirs[key].numel() > 1000 or key in ("class_token", "cls_token"):
            assert ours.std().item() == pytest.approx(theirs[key].std().item(), rel=0.15), key
        if theirs[key].unique().numel() == 1:
            assert torch.equal(ours, theirs[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_a_family(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert family_initialiser(model) in INITIALISERS


@pytest.mark.parametrize(
    ("networks", "initialiser"),
    [
        ("vgg11 vgg13 vgg16 vgg19", "cifar_vgg"),
        ("resnet20 resnet56 resnet110 preresnet20 preresnet164", "cifar_resnet"),
        ("densenet40 densenet_bc100 resnext29", "cifar_resnet"),
        ("vgg16_gap vgg11_bn1d", "slimming_vgg"),
        ("preact_resnet50", "kaiming_fan_in"),
        ("torchvision.models:resnet34 torchvision.models:resnet50", "torchvision_resnet"),
        ("torchvision.models:vgg16 torchvision.models:vgg16_bn", "torchvision_vgg"),
        ("torchvision.models:mobilenet_v2 torchvision.models:mobilenet_v3_large", "torchvision_vgg"),
        ("torchvision.models:vit_b_16", "torchvision_vit"),
        ("torchvision.models:swin_t torchvision.models:swin_v2_t", "torchvision_swin"),
        ("torchvision.models:convnext_tiny", "torchvision_convnext"),
        ("vit_tiny vit_small", "timm_vit"),
        ("convnext_atto", "timm_convnext"),
        ("torchvision.models:densenet121 torchvision.models:shufflenet_v2_x1_0", None),
    ],
)
def test_families_are_drawn_as_published(networks: str, initialiser: str | None) -> None:
    for name in networks.split():
        with torch.device("meta"):
            model = build_model(name)
        assert family_initialiser(model) == initialiser, name


def test_a_network_derived_from_a_family_is_of_no_family() -> None:
    class Wider(ResNet):
        pass

    assert family_initialiser(Wider(20)) is None


@pytest.mark.parametrize(
    "name", ["vgg11", "resnet20", "preresnet20", "densenet40", "vgg16_gap", "vit_tiny", "convnext_atto"]
)
def test_an_initialiser_redraws_everything(name: str) -> None:
    model = build_model(name)
    initialiser = INITIALISERS[family_initialiser(model) or ""]
    with seeded(3):
        initialiser(model)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    with seeded(3):
        initialiser(model)
    assert all(torch.equal(expected[key], tensor) for key, tensor in model.state_dict().items())


def test_a_module_that_cannot_draw_its_weights_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"0 \(Scale\) has no reset_parameters"):
        INITIALISERS["reset_parameters"](nn.Sequential(Scale()))
