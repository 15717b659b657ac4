"""Networks: published sizes, initialisations, the shortcut, networks of the user's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rethink_prune import build_model, count_cost
from rethink_prune.errors import UserError
from rethink_prune.models import MODELS
from rethink_prune.models.initialisers import INITIALISERS, family_initialiser
from rethink_prune.seeds import seeded


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("vgg16", 14987722, 313463808),
        ("resnet56", 853018, 125485696),
        ("resnet110", 1727962, 252887680),
    ],
)
def test_published_parameters_and_macs(name: str, params: int, macs: int) -> None:
    cost = count_cost(build_model(name), (3, 32, 32))
    assert (cost.params, cost.macs) == (params, macs)


def test_macs_of_a_network_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 25, 7)
    )
    cost = count_cost(model, (4, 5, 5))
    assert cost.macs == 25 * 6 * 2 * 9 + 6 * 25 * 7
    assert cost.params == 6 * 2 * 9 + 6 + 12 + 7 * 150 + 7
    assert cost.train_flops(10) == 60 * cost.macs


def test_counting_leaves_the_network_alone() -> None:
    model = build_model("resnet20").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_cost(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [16, 32, 40])
def test_every_network_takes_other_image_sizes_and_channels(name: str, size: int) -> None:
    model = build_model(name, num_classes=7, in_channels=1).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_resnet_takes_odd_sizes() -> None:
    assert build_model("resnet20").eval()(torch.zeros(2, 3, 27, 27)).shape == (2, 10)


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


@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
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


def test_gradient_through_the_shortcut_and_detached_as_in_the_reference_code() -> None:
    def stem_gradient(detach: bool) -> torch.Tensor:
        with seeded(0):
            model = build_model("resnet20", detach_shortcut=detach).eval()
        # With the residual branches silenced, the shortcuts are the only way back.
        for name, module in model.named_modules():
            if name.endswith("bn2"):
                nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        model(torch.ones(1, 3, 32, 32)).sum().backward()
        gradient = model.get_parameter("conv1.weight").grad
        return torch.zeros(1) if gradient is None else gradient

    assert stem_gradient(detach=False).abs().sum() > 0
    assert stem_gradient(detach=True).abs().sum() == 0


def test_detaching_changes_no_output() -> None:
    with seeded(0):
        plain = build_model("resnet20").eval()
    with seeded(0):
        detached = build_model("resnet20", detach_shortcut=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(x), detached(x))


def test_own_network_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(width, num_classes))\n"
        "def failing(num_classes):\n"
        "    return {}['a']\n"
        "def wrong(num_classes):\n"
        "    return 'a string'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build_model("my_nets:small", num_classes=5, width=6)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    with pytest.raises(UserError, match=r"model\.depth: my_nets:small has no such option; it has: width"):
        build_model("my_nets:small", depth=3)
    assert build_model("my_nets:small", in_channels=1), "whether it takes such images, its first pass will tell"
    with pytest.raises(UserError, match=r"my_nets:failing: building it with num_classes=10 failed with KeyError"):
        build_model("my_nets:failing")
    with pytest.raises(UserError, match="gave a str, not a"):
        build_model("my_nets:wrong")
    with pytest.raises(UserError, match="no module named nowhere"):
        build_model("nowhere:net")


def test_an_unknown_network_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"model\.name=resnet57: no such network; one of vgg11, .*resnet110"):
        build_model("resnet57")


def test_an_option_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.detach_shortcut: vgg16 has no such option"):
        build_model("vgg16", detach_shortcut=True)
