"""Networks: published sizes, options, the shortcut, configurations, networks of the user's own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from rethink_prune import build_model, count_cost, models
from rethink_prune.errors import UserError
from rethink_prune.files import conf_dir
from rethink_prune.models import MODELS, asked_options, takes_image_size
from rethink_prune.models.initialisers import family_initialiser
from rethink_prune.seeds import seeded
from rethink_prune.surgery.channels import analyse

CONFIGS = Path(conf_dir()) / "model"
SMALLEST_IMAGES = {"vgg11_bn1d": 32}  # of networks that need more than 16 x 16
WITH_LAYER_NORMS = ("convnext_atto", "vit_small", "vit_tiny")  # these keep channels whole


def without_weights(name: str, **options: Any) -> nn.Module:
    """Build a network that has shapes but no values, which takes no time and memory."""
    with torch.device("meta"):
        return build_model(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "params", "macs"),
    [
        ("vgg16", {}, 14987722, 313463808),
        ("vgg19", {"head": "linear"}, 20035018, 398136320),
        ("vgg19", {"head": "linear", "conv_bias": True}, 20040522, 398136320),
        ("resnet56", {}, 853018, 125485696),
        ("resnet110", {}, 1727962, 252887680),
        ("preresnet110", {}, 1146842, 167430656),
        ("densenet_bc100", {}, 769162, 287929692),
        ("densenet_bc100", {"bottleneck": False}, 4068490, 1324548732),
        ("resnext29", {}, 34426698, 5387266048),
    ],
)
def test_published_parameters_and_macs(name: str, options: dict[str, Any], params: int, macs: int) -> None:
    cost = count_cost(without_weights(name, **options), (3, 32, 32))
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize(
    ("name", "norms", "params", "macs"),
    [("preresnet164", ("bn1", "bn"), 1711338, 247646720), ("densenet40", ("0", "bn"), 1068658, 282917328)],
)
def test_published_parameters_that_include_channel_selections(
    name: str, norms: tuple[str, ...], params: int, macs: int
) -> None:
    """The reference code's slimming networks have a vector of indexes after some norms, and count it as parameters."""
    model = without_weights(name)
    selected = (
        module.num_features
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and path.rpartition(".")[2] in norms
    )
    cost = count_cost(model, (3, 32, 32))
    assert (cost.params + sum(selected), cost.macs) == (params, macs)


def test_the_second_published_resnext() -> None:
    assert count_cost(without_weights("resnext29", cardinality=16), (3, 32, 32)).params == 68155210


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        # By hand from torchvision's: VGG-16 with another classifier, VGG-11 with two more batch norms, and ResNet-50
        # with 22,784 channels of batch norm instead of 26,560.
        ("vgg16_gap", 138357544 - 123642856 + 513 * 1000, 15470264320 - 123633664 + 512 * 1000),
        ("vgg11_bn1d", 132868840 + 2 * 2 * 4096, 7609090048),
        ("preact_resnet50", 25557032 - 2 * (26560 - 22784), 4089184256),
    ],
)
def test_imagenet_networks(name: str, params: int, macs: int) -> None:
    cost = count_cost(without_weights(name, num_classes=1000), (3, 224, 224))
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.parametrize(
    ("kept", "epochs"),
    [
        # Blocks kept of each stage, and whether its first block is among them: ResNet-41, -32 and -26.
        (((0, False), (4, True), (6, True), (3, True)), 117),
        (((1, False), (4, True), (4, True), (1, True)), 145),
        (((0, False), (2, False), (5, False), (1, True)), 179),
    ],
)
def test_removed_blocks_give_the_published_epochs(kept: Sequence[tuple[int, bool]], epochs: int) -> None:
    """Sparse Structure Selection trains for int(100 * MACs before / after); the stride in a 1 x 1 would not give it."""
    model = without_weights("preact_resnet50", num_classes=1000)
    full = count_cost(model, (3, 224, 224)).macs
    for number, (count, first) in enumerate(kept, start=1):
        stage = model.get_submodule(f"layer{number}")
        assert isinstance(stage, nn.Sequential)
        if not first:  # what is left of it brings the input to the stage's shape
            stage[0] = nn.Sequential(stage[0].bn1, stage[0].relu, stage[0].projection)
        for i in range(1 + count - first, len(stage)):
            stage[i] = nn.Identity()
    assert int(100 * full / count_cost(model, (3, 224, 224)).macs) == epochs


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_LAYER_NORMS])
def test_the_analysis_follows_every_network(name: str) -> None:
    for_imagenet = inspect.signature(MODELS[name]).parameters["num_classes"].default == 1000
    size = 224 if for_imagenet else 32
    channels = analyse(without_weights(name), torch.zeros(2, 3, size, size))
    assert channels.warnings == ()
    assert list(channels.frozen.values()) == ["network output"]
    covered = {layer for group in channels.groups("all") for layer in group.layers}
    layers = [path for path, m in without_weights(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert covered | set(channels.frozen) == set(layers)


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
    size = max(size, SMALLEST_IMAGES.get(name, 16))
    sizes = {"image_size": size} if takes_image_size(name) else {}
    model = without_weights(name, num_classes=7, in_channels=1, **sizes)
    assert model(torch.zeros(2, 1, size, size, device="meta")).shape == (2, 7)


def test_resnet_takes_odd_sizes() -> None:
    assert build_model("resnet20").eval()(torch.zeros(2, 3, 27, 27)).shape == (2, 10)


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
    with pytest.raises(
        UserError,
        match=r"^model\.name=resnet57: no such network \(your own: .*\); did you mean resnet56, resn.*\?$",
    ):
        build_model("resnet57")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg16", {"head": "wide"}, "model.head=wide: must be mlp or linear"),
        ("vgg16", {"conv_bias": "no"}, "model.conv_bias=no: must be true or false"),
        ("densenet40", {"growth_rate": 0}, "model.growth_rate=0: must be at least 1"),
        ("densenet40", {"compression": 1.5}, "model.compression=1.5: must be in (0, 1]"),
        ("densenet40", {"compression": "half"}, "model.compression=half: must be a number"),
        ("resnext29", {"cardinality": 0}, "model.cardinality=0: must be at least 1"),
        ("resnext29", {"base_width": 4.5}, "model.base_width=4.5: must be a whole number"),
        ("vit_tiny", {"patch_size": 5}, "model.patch_size=5: must divide the size of the images, 32"),
        ("vit_tiny", {"patch_size": 0}, "model.patch_size=0: must be at least 1"),
        ("vit_tiny", {"heads": 5}, "model.heads=5: must divide dim=192"),
        ("vit_tiny", {"mlp_ratio": 0.001}, "model.mlp_ratio=0.001: must leave at least one hidden unit"),
        ("vit_tiny", {"drop_path": 1}, "model.drop_path=1: must be in [0, 1)"),
        ("convnext_atto", {"stages": 5}, "model.stages=5: must be from 1 to 4"),
        ("convnext_atto", {"width": 0}, "model.width=0: must be at least 1"),
    ],
)
def test_a_wrong_value_of_an_option_is_one_clear_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        without_weights(name, **options)
    assert str(error.value) == message


def test_options_that_stand_for_their_default_change_nothing() -> None:
    plain, spelled_out = without_weights("densenet_bc100"), without_weights("densenet_bc100", compression=0.5)
    assert str(plain) == str(spelled_out)
    assert count_cost(without_weights("densenet40", compression=1), (3, 32, 32)) == count_cost(
        without_weights("densenet40"), (3, 32, 32)
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_builds_its_network_with_its_defaults(path: Path) -> None:
    assert path.read_text().startswith("# ")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(f"model/{path.stem}").model)
    assert list(config)[:2] == ["name", "init"]
    assert (config.pop("init"), config.pop("args")) == (None, {})
    name = config.pop("name")
    if name.startswith("timm."):
        pytest.importorskip("timm")
    theirs = {f"torchvision.models:{path.stem.removesuffix('_imagenet')}", "timm.models:deit_small_patch16_224"}
    assert name == path.stem or name in theirs
    assert family_initialiser(without_weights(name)) is not None
    assert str(without_weights(name, **config)) == str(without_weights(name))


def test_no_two_families_have_a_network_of_the_same_name() -> None:
    files = [
        importlib.import_module(file.name) for file in pkgutil.iter_modules(models.__path__, "rethink_prune.models.")
    ]
    names = [name for file in files for name in getattr(file, "NETWORKS", {})]
    assert sorted(names) == sorted(MODELS)


def test_options_of_another_network_are_left_out_unless_someone_chose_them() -> None:
    assert asked_options("vgg16", {"head": "linear", "detach_shortcut": False}) == {"head": "linear"}
    assert asked_options("vgg16", {"detach_shortcut": True, "growth_rate": [1]}) == {
        "detach_shortcut": True,
        "growth_rate": [1],
    }
    assert asked_options("torch.nn:Linear", {"head": "mlp", "bias": True}) == {"bias": True}


def test_every_network_has_a_yaml() -> None:
    assert set(MODELS) <= {path.stem for path in CONFIGS.glob("*.yaml")}


def test_an_option_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.detach_shortcut: vgg16 has no such option"):
        build_model("vgg16", detach_shortcut=True)
