"""The analysis on networks that nobody wrote for it, and against an independent implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning
from torch import nn
from torchvision import models

from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply

Compare = Callable[..., tuple[Channels, nn.Module]]

IMAGE = (2, 3, 32, 32)


def vgg(name: str) -> nn.Module:
    """Build a VGG with a narrow classifier, which has nine tenths of the parameters otherwise."""
    with torch.device("meta"):
        model = models.get_model(name)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model


# How to build it, the shape of its input, and which share of the parameters may at most be left when half of the
# units of scope "all" go. Where much is left, something stays whole: channel shuffles, layer norms.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=10), IMAGE, 0.6),
    "densenet121": (lambda: models.densenet121(num_classes=10), IMAGE, 0.35),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), IMAGE, 0.4),
    "googlenet": (
        lambda: models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
        IMAGE,
        0.35,
    ),
    "inception_v3": (
        lambda: models.inception_v3(num_classes=10, aux_logits=False, init_weights=False),
        (2, 3, 75, 75),
        0.35,
    ),
    "mnasnet1_0": (lambda: models.mnasnet1_0(num_classes=10), IMAGE, 0.4),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=10), IMAGE, 0.4),
    "mobilenet_v3_large": (lambda: models.mobilenet_v3_large(num_classes=10), IMAGE, 0.4),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(num_classes=10), IMAGE, 0.4),
    "resnet18": (lambda: models.resnet18(num_classes=10), IMAGE, 0.3),
    "resnet50": (lambda: models.resnet50(num_classes=10), IMAGE, 0.35),
    "resnext50_32x4d": (lambda: models.resnext50_32x4d(num_classes=10), IMAGE, 0.4),
    "shufflenet_v2_x0_5": (lambda: models.shufflenet_v2_x0_5(num_classes=10), IMAGE, 0.6),
    "squeezenet1_1": (lambda: models.squeezenet1_1(num_classes=10), IMAGE, 0.4),
    "vgg11_bn": (lambda: vgg("vgg11_bn"), IMAGE, 0.3),
    "vgg16_bn": (lambda: vgg("vgg16_bn"), IMAGE, 0.3),
    "vision_transformer": (
        lambda: models.VisionTransformer(32, 16, 2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10),
        IMAGE,
        0.75,
    ),
    "swin": (lambda: swin("v1"), (2, 3, 64, 64), 0.7),
    "swin_v2": (lambda: swin("v2"), (2, 3, 64, 64), 0.75),
    "maxvit": (
        lambda: models.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 8, 0.2, num_classes=10),
        (2, 3, 64, 64),
        0.6,
    ),
}


def swin(version: str) -> nn.Module:
    """Build a small Swin transformer, with shifted windows in its second block."""
    from torchvision.models import swin_transformer

    block, merging = (
        (swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging)
        if version == "v1"
        else (swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2)
    )
    return models.SwinTransformer(
        [4, 4],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        stochastic_depth_prob=0.2,
        num_classes=10,
        block=block,
        downsample_layer=merging,
    )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_equals_masked(pruned_equals_masked: Compare, name: str) -> None:
    build, shape, share = NETWORKS[name]
    model = build()
    _, pruned = pruned_equals_masked(model, shape, scope="all")
    assert isinstance(pruned, type(model))
    assert parameters(pruned) / parameters(model) < share


@pytest.mark.parametrize(
    ("name", "inner", "coupled", "frozen"),
    [
        ("resnet18", 8, 4, {"fc"}),
        ("resnet50", 33, 4, {"fc"}),
        ("resnext50_32x4d", 17, 4, {"fc"}),
        ("densenet121", 120, 0, {"classifier"}),
        ("mobilenet_v2", 20, 5, {"classifier.1"}),
        ("mobilenet_v3_large", 24, 6, {"classifier.3"}),
        ("vgg16_bn", 15, 0, {"classifier.6"}),
    ],
)
def test_number_of_groups(name: str, inner: int, coupled: int, frozen: set[str]) -> None:
    with torch.device("meta"):
        model = models.get_model(name)
    channels = analyse(model, torch.empty(1, 3, 64, 64, device="meta"))
    assert len(channels.groups("inner")) == inner
    assert len(channels.groups("all")) == inner + coupled
    assert channels.frozen == dict.fromkeys(frozen, "network output")
    assert channels.warnings == ()


def test_inner_groups_of_bottlenecks_are_their_first_two_convolutions() -> None:
    channels = analyse(models.resnet50(num_classes=10), torch.empty(1, 3, 64, 64))
    names = {group.name.rpartition(".")[2] for group in channels.groups("inner")[1:]}
    assert names == {"conv1", "conv2"}
    # The stem is read by the first block and by its projection, and added to nothing itself.
    assert channels.groups("inner")[0].name == "conv1"
    assert channels.consumers("conv1") == ("layer1.0.conv1", "layer1.0.downsample.0")


def test_gates_go_with_the_channels_they_scale() -> None:
    channels = analyse(models.mobilenet_v3_large(num_classes=10), torch.empty(1, 3, 64, 64))
    block = "features.5.block"
    (group,) = (group for group in channels.groups() if group.name == f"{block}.0.0")
    assert group.layers == (f"{block}.0.0", f"{block}.1.0", f"{block}.2.fc2")


def test_auxiliary_heads_are_cut_with_the_stream_they_read() -> None:
    model = models.googlenet(num_classes=10, init_weights=False)
    channels = analyse(model, torch.empty(1, 3, 64, 64))
    drop = {group.name: range(group.size // 2) for group in channels.groups()}
    pruned, _ = apply(model, channels.plan(drop))
    outputs = pruned.train()(torch.randn(2, 3, 64, 64))
    assert [tuple(output.shape) for output in outputs] == [(2, 10)] * 3
    assert "aux1.conv.conv" in drop


@pytest.mark.parametrize(
    ("name", "layer", "dropped"),
    [
        ("resnet18", "layer2.1.conv1", [0, 5, 9]),
        ("resnet18", "layer3.0.conv2", [1, 2]),
        ("resnet50", "layer1.2.conv2", [7]),
        ("vgg11_bn", "features.4", [3, 100]),
        ("vgg11_bn", "features.25", [0, 511]),
        ("mobilenet_v2", "features.3.conv.0.0", [1, 2, 3]),
        ("densenet121", "features.denseblock2.denselayer3.conv2", [4]),
        ("efficientnet_b0", "features.3.0.block.0.0", [10, 20]),
    ],
)
def test_torch_pruning_removes_as_many_parameters(name: str, layer: str, dropped: list[int]) -> None:
    model = (NETWORKS[name][0]() if name.startswith("vgg") else models.get_model(name, num_classes=10)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    example = torch.randn(1, 3, 64, 64)
    channels = analyse(model, example)
    group, units = next(
        (group, units)
        for group in channels.groups("all")
        if layer in group.layers and (units := [group.units.index(u) for u in group.units if u[layer][0] in dropped])
    )
    ours, _ = apply(model, channels.plan({group.name: units}))

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    module = model.get_submodule(layer)
    graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, idxs=dropped).prune()
    assert parameters(ours) == parameters(model)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes
    with torch.no_grad():
        assert torch.allclose(ours(example), model(example), atol=1e-5)
