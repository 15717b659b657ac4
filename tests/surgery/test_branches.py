"""Removing residual branches: what remains computes what the network with the branch at zero computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from harness import randomise
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply, reshape
from rethink_prune.surgery.graph import trace

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

NETWORKS: list[tuple[Callable[[], nn.Module], tuple[str, ...]]] = [
    (lambda: build_model("resnet20"), ("layer1.0.bn2", "layer2.0.bn2", "layer3.2.bn2", "layer2.1.bn2")),
    (lambda: build_model("preresnet20"), ("layer1.0.conv3", "layer1.1.conv3", "layer3.0.conv3")),
    (lambda: models.resnet18(num_classes=10), ("layer1.0.bn2", "layer1.1.bn2", "layer3.0.bn2", "layer4.1.bn2")),
    (lambda: models.resnet50(num_classes=10), ("layer1.0.bn3", "layer2.3.bn3", "layer4.0.bn3")),
    (lambda: models.mobilenet_v2(num_classes=10), ("features.3.conv.3", "features.9.conv.3", "features.10.conv.3")),
]


class Block(nn.Module):
    """A residual branch with options to be difficult."""

    def __init__(
        self, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first = first or nn.Identity()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.add = add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        before = self.norm(self.conv(self.first(x) * self.scale))
        return F.relu(self.add(x, before), inplace=True) + x


def zero(model: nn.Module, ends: tuple[str, ...]) -> nn.Module:
    """Return a copy in which the branches return zeros."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for end in ends:
            for parameter in model.get_submodule(end).parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize(("build", "ends"), NETWORKS)
def test_equals_the_network_with_branches_at_zero_exactly(
    build: Callable[[], nn.Module], ends: tuple[str, ...]
) -> None:
    model = randomise(build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    removed = remove_branches(model, ends)
    with torch.no_grad():
        assert torch.equal(removed(IMAGES), zero(model, ends)(IMAGES))
        assert not torch.equal(removed(IMAGES), model(IMAGES))
    assert removed.state_dict().keys() < model.state_dict().keys()
    assert not any(name.startswith(tuple(ends)) for name in removed.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("build", "ends"), NETWORKS[:3])
def test_gradients_in_training_mode_equal_those_with_branches_at_zero(
    build: Callable[[], nn.Module], ends: tuple[str, ...]
) -> None:
    model = randomise(build()).train()
    removed, reference = remove_branches(model, ends), zero(model, ends)
    assert removed.training
    for network in (removed, reference):
        network(IMAGES).square().sum().backward()
    for name, parameter in removed.named_parameters():
        expected = reference.get_parameter(name).grad
        assert parameter.grad is not None
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


def test_modules_and_parameters_of_the_branch_alone_are_gone() -> None:
    removed = remove_branches(Block(torch.add), ["norm"])
    assert set(removed.state_dict()) == {"stem.weight", "stem.bias"}


def test_an_in_place_activation_after_the_sum_does_not_reach_the_shortcut() -> None:
    model = randomise(Block(torch.add))
    removed = remove_branches(model, ["norm"])
    stem = model.stem(IMAGES)
    assert (stem < 0).any()
    assert torch.equal(removed(IMAGES), F.relu(stem) + stem)


def test_order_of_ends_does_not_matter() -> None:
    model = randomise(build_model("preresnet20"))
    ends = ["layer1.0.conv3", "layer1.1.conv3", "layer2.1.conv3"]
    graphs = [str(trace(on_meta(remove_branches(model, order)))) for order in (ends, ends[::-1])]
    assert graphs[0] == graphs[1]


def test_rebuilds_from_its_architecture_after_channels_were_cut(tmp_path: Path) -> None:
    model = randomise(build_model("resnet20"))
    pruned, architecture = apply(model, analyse(model, IMAGES).plan({"layer1.1.conv1": [0, 5], "layer2.1.conv1": [3]}))
    ends = ("layer1.0.bn2", "layer2.1.bn2")
    pruned = remove_branches(pruned, ends)
    Architecture(architecture.modules, removed=ends).save(tmp_path)
    rebuilt = reshape(build_model("resnet20").double().eval(), Architecture.load(tmp_path))
    rebuilt.load_state_dict(pruned.state_dict())
    assert list(rebuilt.state_dict()) == list(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), pruned(IMAGES))


def test_a_network_that_lost_branches_can_lose_more() -> None:
    model = randomise(build_model("resnet20"))
    twice = remove_branches(remove_branches(model, ["layer1.0.bn2"]), ["layer2.0.bn2"])
    with torch.no_grad():
        assert torch.equal(twice(IMAGES), zero(model, ("layer1.0.bn2", "layer2.0.bn2"))(IMAGES))


class Nested(nn.Module):
    """A residual branch inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.a(x)
        return x + self.c(inner + self.b(inner))


def test_a_branch_inside_another_goes_with_it_or_alone() -> None:
    model = randomise(Nested())
    for ends in (["b", "c"], ["c", "b"]):
        removed = remove_branches(model, ends)
        assert torch.equal(removed(IMAGES), IMAGES)
        assert not removed.state_dict()
    assert torch.equal(remove_branches(model, ["b"])(IMAGES), IMAGES + model.c(model.a(IMAGES)))


def test_an_unknown_module_is_one_clear_line() -> None:
    with pytest.raises(
        UserError, match=r"^ResNet: layer9\.0\.bn2 does not end a residual branch: it is called 0 times$"
    ):
        remove_branches(build_model("resnet20"), ["layer9.0.bn2"])
    with pytest.raises(UserError, match=r"^ResNet: has no layer9\.0\.bn2, which the architecture changes$"):
        reshape(build_model("resnet20"), Architecture(removed=("layer9.0.bn2",)))


def test_a_module_that_ends_no_branch_is_refused() -> None:
    with pytest.raises(UserError, match="bn1 does not end a residual branch"):
        remove_branches(build_model("resnet20"), ["bn1"])
    with pytest.raises(UserError, match="fc does not end a residual branch: it is read by output"):
        remove_branches(build_model("resnet20"), ["fc"])


def test_both_operands_of_an_addition_cannot_go() -> None:
    with pytest.raises(UserError, match=r"layer1\.0\.conv3 and layer1\.0\.projection end in one addition"):
        remove_branches(build_model("preresnet20"), ["layer1.0.conv3", "layer1.0.projection"])


def test_a_sum_that_scales_an_operand_is_no_plain_addition() -> None:
    with pytest.raises(UserError, match="norm does not end a residual branch: it is read by add"):
        remove_branches(Block(lambda x, y: torch.add(x, y, alpha=2)), ["norm"])


def test_a_branch_that_overwrites_the_shortcut_is_refused() -> None:
    with pytest.raises(UserError, match="norm: its branch cannot be removed, because it overwrites stem"):
        remove_branches(Block(torch.add, nn.ReLU(inplace=True)), ["norm"])


def test_different_operations_in_training_mode_are_refused() -> None:
    model = Block(lambda x, y: x + F.dropout(y, 0.5))
    remove_branches(model, ["norm"])  # always on: the same in both modes

    class Dropping(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    with pytest.raises(UserError, match="training and evaluation mode run different operations"):
        remove_branches(Dropping(torch.add), ["norm"])
