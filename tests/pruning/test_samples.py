"""Working copies and the samples drawn from them, compared with what the layers and the masked network compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness import mask
from rethink_prune import build_model
from rethink_prune.errors import UserError
from rethink_prune.pruning.reconstruction import WorkingCopy
from rethink_prune.pruning.samples import (
    FirstImages,
    draw_places,
    output_positions,
    pieces,
    read_outputs,
    read_patches,
)
from rethink_prune.surgery.architecture import select_inputs
from rethink_prune.surgery.channels import analyse

CPU = torch.device("cpu")
LAYERS = [
    (nn.Conv2d(4, 5, 3), (3, 4, 7, 9)),
    (nn.Conv2d(4, 5, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)), (3, 4, 9, 11)),
    (nn.Conv2d(4, 5, 2, padding="same"), (3, 4, 6, 5)),
    (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (3, 4, 6, 5)),
    (nn.Conv1d(4, 5, 3, stride=2, padding=1), (3, 4, 8)),
    (nn.Conv3d(4, 5, 2, padding=1), (2, 4, 3, 4, 5)),
    (nn.Linear(4, 5), (6, 4)),
    (nn.Linear(4, 5), (3, 7, 4)),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_patches_times_weights_are_the_layers_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, inputs = layer.double(), torch.randn(shape, generator=generator(), dtype=torch.float64)
    places = draw_places(layer, inputs, 20, generator())
    assert len(places[0]) == 20 * len(inputs)
    patches = read_patches(layer, inputs, places).flatten(1)
    with torch.no_grad():
        computed = patches @ layer.get_parameter("weight").flatten(1).T + layer.get_parameter("bias")
        assert (computed - read_outputs(layer, layer(inputs), places)).abs().max() < 1e-12
    assert torch.equal(torch.cat([torch.stack(piece) for piece in pieces(places, 2**20)], 1), torch.stack(places))


def test_a_selecting_layer_is_sampled_behind_its_selection() -> None:
    layer, inputs = nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    select_inputs(layer, torch.tensor([4, 1]))
    places = draw_places(layer, inputs, 9, generator())
    with torch.no_grad():
        computed = read_patches(layer, inputs, places).flatten(1) @ layer.weight.flatten(1).T + layer.bias
        assert (computed - read_outputs(layer, layer(inputs), places)).abs().max() < 1e-12


def test_few_distinct_places_are_taken_once_and_draws_repeat_with_the_seed() -> None:
    layer, inputs = nn.Conv2d(1, 1, 3), torch.zeros(2, 1, 5, 4)
    places = draw_places(layer, inputs, 6, generator(), distinct=True)
    found = torch.stack(places, 1).tolist()
    assert sorted(found) == [[image, row, column] for image in range(2) for row in range(3) for column in range(2)]
    first, again = (draw_places(layer, inputs, 4, generator(3)) for _ in range(2))
    assert torch.equal(first[1], again[1])
    assert len(draw_places(layer, inputs, 4, generator(), distinct=True)[0]) == 8


class InPlace(nn.Module):
    """Overwrites what its second convolution read, and counts how often its last one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        x = self.first(x)
        y = self.bn(self.second(x))
        x.mul_(0)
        y += x
        return self.last(y * scale)


def test_arguments_are_read_before_later_operations_overwrite_them_and_nothing_runs_after() -> None:
    model, images = InPlace().double(), torch.randn(2, 3, 4, 4)
    copy = WorkingCopy(model, CPU)
    runs: list[int] = []
    copy.layer("last").register_forward_hook(lambda *_: runs.append(1))
    shortcut = copy.shortcut("second")
    assert shortcut is not None
    assert (shortcut.norm, shortcut.operand) == ("bn", 1)
    read = copy.read({"second", shortcut.addition}, images)
    assert torch.allclose(read["second"][0], model.first(images.double()))
    assert not read[shortcut.addition][shortcut.operand].any()
    assert not runs
    copy.read({"last"}, images)
    assert not runs
    assert model.training
    assert copy.shortcut("last") is None


@pytest.mark.parametrize("network", ["vgg11", "resnet20", "preresnet20", "densenet40"])
def test_removing_units_is_masking_them(network: str) -> None:
    model, images = build_model(network).double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    channels = analyse(model, images)
    copy = WorkingCopy(model, CPU)
    drop = {group.name: range(group.size // 2) for group in channels.groups("all")}
    for group in channels.groups("all"):
        copy.remove(group, drop[group.name], copy.readers(channels, group))
    with torch.no_grad():
        expected = mask(model, channels, drop)(images)
        assert (copy.module(images) - expected).abs().max() < 1e-10
        assert (model(images) - expected).abs().max() > 1e-6


def test_readers_list_every_feature_of_a_unit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    channels = analyse(model, torch.zeros(1, 3, 8, 8))
    (group,) = channels.groups()
    (reader,) = WorkingCopy(model, CPU).readers(channels, group)
    assert (reader.layer, len(reader.nodes)) == ("3", 1)
    assert torch.equal(reader.columns, torch.arange(144))
    assert torch.equal(reader.units, torch.arange(4).repeat_interleave(36))
    assert output_positions(model, (3, 8, 8)) == {"0": 36, "3": 1}


def test_layers_with_one_weight_are_one_reader_with_several_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.twin = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
            self.twin.weight = self.head.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.head(x) + self.head(x.relu()) + self.twin(x)

    model = Twice()
    channels = analyse(model, torch.zeros(1, 3, 8, 8))
    (group,) = channels.groups()
    (reader,) = WorkingCopy(model, CPU).readers(channels, group)
    assert len(reader.nodes) == 3


def test_only_the_first_images_are_read() -> None:
    data = [(torch.full((4, 1), float(batch)), torch.zeros(4)) for batch in range(3)]
    images = FirstImages(data, 6, (1,))
    assert [batch[:, 0].tolist() for batch in images] == [[0.0] * 4, [1.0] * 2]
    assert sum(map(len, images)) == 6
    assert sum(map(len, FirstImages(data, 100, (1,)))) == 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "that can be read many times"),
        (iter([(torch.zeros(2, 3, 8, 8), torch.zeros(2))]), "that can be read many times"),
        ([], "holds no images"),
        ([torch.zeros(2, 3, 8, 8)], "a batch must be a pair of images and labels, not a Tensor"),
        (
            [(torch.zeros(2, 1, 8, 8), torch.zeros(2))],
            "its images are 1 x 8 x 8, but the network was analysed for 3 x 8 x",
        ),
    ],
)
def test_data_that_cannot_be_sampled_are_refused(data: object, message: str) -> None:
    with pytest.raises(UserError, match=f"data: .*{message}"):
        FirstImages(data, 10, (3, 8, 8))  # type: ignore[arg-type]
