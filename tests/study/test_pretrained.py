"""Published weights for the unpruned network: ``large.checkpoint=torchvision:NAME``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights

from rethink_prune import build_model
from rethink_prune.errors import UserError
from rethink_prune.study.pretrained import read_checkpoint

NETWORK = "torchvision.models:resnet18"
FILE = ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where torchvision's weights are looked for, on a machine without network."""

    def unreachable(url: str, *_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_without_network_the_error_says_which_file_to_put_where(hub: Path) -> None:
    model = build_model(NETWORK, num_classes=1000)
    with pytest.raises(UserError) as error:
        read_checkpoint("torchvision:IMAGENET1K_V1", model, NETWORK)
    message = str(error.value)
    assert "no route to host" in message
    assert message.endswith(f"put {FILE} (from {ResNet18_Weights.IMAGENET1K_V1.url}) into {hub}")
    assert "\n" not in message


def test_a_file_put_there_is_taken(hub: Path) -> None:
    published, model = build_model(NETWORK, num_classes=1000), build_model(NETWORK, num_classes=1000)
    hub.mkdir()
    torch.save(published.state_dict(), hub / FILE)
    checkpoint = read_checkpoint("torchvision:IMAGENET1K_V1", model, NETWORK)
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in published.state_dict().items())
    assert torch.equal(model.get_parameter("fc.weight"), published.get_parameter("fc.weight"))


@pytest.mark.parametrize(
    ("source", "network", "classes", "message"),
    [
        ("torchvision:IMAGENET1K_V9", NETWORK, 1000, "resnet18 has IMAGENET1K_V1"),
        ("torchvision:IMAGENET1K_V1", "resnet20", 10, "is for torchvision networks, not for resnet20"),
        ("torchvision:IMAGENET1K_V1", NETWORK, 10, r"fc.weight is \(1000, 512\) and should be \(10, 512\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(source: str, network: str, classes: int, message: str, hub: Path) -> None:
    hub.mkdir()
    torch.save(build_model(NETWORK, num_classes=1000).state_dict(), hub / FILE)
    with pytest.raises(UserError, match=message):
        read_checkpoint(source, build_model(network, num_classes=classes), network)


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


OTHERS = {"criterion.weight": torch.ones(3), "teacher.bias": torch.ones(2)}
FILES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, object]]] = {
    "as it is": dict,
    "before batch norms counted": lambda s: {n: t for n, t in s.items() if not n.endswith("num_batches_tracked")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "parallel": lambda s: {"model": prefixed(s, "module.")},
    "compiled in parallel": lambda s: {"state_dict": prefixed(s, "module._orig_mod."), "epoch": 3},
    "lightning": lambda s: {"state_dict": prefixed(s, "model.") | OTHERS, "optimizer_states": [{"state": {}}]},
    "a block compiled": lambda s: {n.replace("layer1.0.", "layer1.0._orig_mod."): t for n, t in s.items()},
    "timm's average": lambda s: {"state_dict_ema": s, "arch": "resnet"},
    "torchvision's average": lambda s: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed(s, "module.")}},
}


@pytest.mark.parametrize("kind", FILES)
def test_checkpoints_that_people_have_are_taken(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, model = build_model("resnet20"), build_model("resnet20")
    torch.save(FILES[kind](trained.state_dict()), tmp_path / "file.pth")
    read_checkpoint(str(tmp_path / "file.pth"), model, "resnet20")
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: prefixed(s, "net.") | prefixed(s, "teacher."), "holds several networks of these names: net., teach"),
        (lambda s: prefixed(dict(list(s.items())[1:]), "net."), "conv1.weight is missing"),
        (lambda s: {n: t for n, t in s.items() if n != "fc.bias"}, "fc.bias is missing"),
    ],
)
def test_others_are_refused_with_the_names_that_they_have(make: Any, message: str, tmp_path: Path) -> None:
    model = build_model("resnet20")
    torch.save(make(model.state_dict()), tmp_path / "file.pth")
    with pytest.raises(UserError) as error:
        read_checkpoint(str(tmp_path / "file.pth"), model, "resnet20")
    assert message in str(error.value)


def test_published_weights_of_torchvision_lack_the_counters(hub: Path) -> None:
    """The file of ResNet-18 holds 102 tensors, those of the network without what batch norms count (torch 0.3)."""
    model = build_model(NETWORK, num_classes=1000)
    published = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(published) == 102
    hub.mkdir()
    torch.save(published, hub / FILE)
    read_checkpoint("torchvision:IMAGENET1K_V1", model, NETWORK)
