"""Published weights for the unpruned network: ``large.checkpoint=torchvision:NAME``."""

from __future__ import annotations

from pathlib import Path
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
