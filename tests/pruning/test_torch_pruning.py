"""Torch-Pruning's scores in this framework: they choose what its own pruner chooses, and errors say what is missing."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch_pruning
from torch import nn

from harness import randomise
from rethink_prune import prune
from rethink_prune.errors import UserError
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning.torch_pruning import make_importance

EXAMPLE = torch.zeros(1, 3, 16, 16)
L1 = {"p": 1, "group_reduction": "first", "normalizer": None}
# Every importance that the installed version has, but for the one that is refused.
IMPORTANCES = sorted(
    name
    for name, found in vars(torch_pruning.pruner.importance).items()
    if isinstance(found, type) and issubclass(found, torch_pruning.importance.Importance)
    if name not in ("Importance", "OBDCImportance")
)


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 3, 16, 16, generator=generator), torch.randint(10, (6,), generator=generator))] * 2


def vgg() -> nn.Module:
    return randomise(VGG((8, "M", 12, 16), head="linear", conv_bias=True)).float()


def pruned(model: nn.Module, importance: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    given = {"importance": importance, "importance_args": arguments or {}, "ratio": 0.5, **options}
    return prune(model, "torch_pruning", example=EXAMPLE, data=images(), **given)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize(
    ("importance", "arguments"),
    [("MagnitudeImportance", L1), ("MagnitudeImportance", {}), ("LAMPImportance", {}), ("FPGMImportance", {})],
)
def test_it_prunes_what_torch_prunings_own_pruner_does(
    importance: str, arguments: dict[str, Any], ratio: float
) -> None:
    ours, theirs = vgg(), vgg()
    torch_pruning.pruner.MagnitudePruner(
        theirs,
        EXAMPLE,
        importance=getattr(torch_pruning.importance, importance)(**arguments),
        pruning_ratio=ratio,
        ignored_layers=[module for module in theirs.modules() if isinstance(module, nn.Linear)],
    ).step()
    found = pruned(ours, importance, arguments, ratio=ratio).model.state_dict()
    assert {name: value.shape for name, value in found.items()} != {n: v.shape for n, v in ours.state_dict().items()}
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[name], value), name


def test_gradients_are_those_of_the_images() -> None:
    ours, theirs = vgg(), vgg().eval()
    for pixels, labels in images():
        nn.functional.cross_entropy(theirs(pixels), labels).backward()
    ignored: list[nn.Module] = [module for module in theirs.modules() if isinstance(module, nn.Linear)]
    importance = torch_pruning.importance.TaylorImportance()
    torch_pruning.pruner.MagnitudePruner(
        theirs, EXAMPLE, importance=importance, pruning_ratio=0.5, ignored_layers=ignored
    ).step()
    found = pruned(ours, "TaylorImportance").model.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_scores_tied_channels_and_leaves_the_network_as_it_is(importance: str) -> None:
    model = randomise(ResNeXt(11, cardinality=1, base_width=8)).float()
    before, random_state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, again = (pruned(model, importance, scope="all") for _ in range(2))
    assert all(layer.kept < layer.full for layer in first.report.layers)
    assert torch.equal(random_state, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), "the seed decides all draws"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_groups_of_a_convolution_go_whole() -> None:
    model = randomise(ResNeXt(11, cardinality=4, base_width=4)).float()
    result = pruned(model, "MagnitudeImportance", L1)
    grouped = [module for module in result.model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert [module.groups for module in grouped] == [2] * len(grouped) != []


@pytest.mark.parametrize(
    ("importance", "arguments", "message"),
    [
        ("MagnitudeImportanc", {}, "no such importance; did you mean MagnitudeImportance"),
        ("l1", {}, "no such importance; known are ActivationImportance, BNScaleImportance"),
        ("OBDCImportance", {}, "needs hooks of Torch-Pruning's own pruner"),
        ("FPGMImportance", {"q": 1}, r"importance_args={'q': 1}: FPGMImportance takes p, group_reduction, normalizer"),
        ("MagnitudeImportance", {"p": "a"}, r"importance_args={'p': 'a'}: MagnitudeImportance cannot score with them"),
        ("TaylorImportance", {"group_reduction": "firrst"}, r"cannot score with them \(NotImplementedError\)"),
        ("RandomImportance", {"p": 1}, "RandomImportance takes none"),
    ],
)
def test_a_wrong_importance_is_told_before_any_training(
    importance: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), importance, arguments)


def test_a_group_that_an_importance_cannot_score_is_named() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"BNScaleImportance: Torch-Pruning has no scores for 0 .it finds nothing"):
        pruned(plain, "BNScaleImportance")


def test_padded_shortcuts_go_with_our_cut_and_not_with_its_own() -> None:
    model = randomise(ResNet(8)).float()
    assert pruned(model, "MagnitudeImportance").model(EXAMPLE).shape == (1, 10)
    with pytest.raises(UserError, match=r"has no scores for .*index.*; try another importance, or pruner.scope=inner"):
        pruned(model, "MagnitudeImportance", scope="all")
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    torch_pruning.pruner.MagnitudePruner(
        model, EXAMPLE, importance=importance, pruning_ratio=0.5, ignored_layers=[model.get_submodule("fc")]
    ).step()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(EXAMPLE)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        UserError, match=r'needs torch-pruning; install it with pip install "rethink-prune\[torch-pruning\]"'
    ):
        make_importance("MagnitudeImportance", {})
