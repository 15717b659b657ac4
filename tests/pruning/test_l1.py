"""L1-norm pruning: its scores, its published targets, and pruning from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rethink_prune import build_model, count_cost, prune
from rethink_prune.errors import UserError
from rethink_prune.pruning import find_pruner

EXAMPLE = torch.zeros(1, 3, 32, 32)


def two_convs() -> nn.Sequential:
    """Filters of the first convolution have the L1 norms 27, 54, 27, 81; the second holds a negative one."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False), nn.Flatten(), nn.Linear(2 * 784, 5)
    )
    with torch.no_grad():
        for filter_, value in zip(model[0].weight, (1.0, -2.0, 1.0, 3.0), strict=True):
            filter_.fill_(value)
        model[2].weight[0].fill_(0.1)
        model[2].weight[1].fill_(-5.0)
    return model


def test_score_is_the_sum_of_absolute_weights_and_ties_keep_the_lower_index() -> None:
    model = two_convs()
    result = prune(model, "l1", example=EXAMPLE, widths=[3, 1])
    assert torch.equal(result.model.get_parameter("0.weight"), model[0].weight[[0, 1, 3]])
    assert torch.equal(result.model.get_parameter("2.weight"), model[2].weight[[1]][:, [0, 1, 3]])
    assert result.model.get_parameter("4.weight").shape == (5, 784)
    assert [(layer.layer, layer.kept, layer.full) for layer in result.report.layers] == [("0", 3, 4), ("2", 1, 2)]


def test_the_network_itself_is_untouched() -> None:
    model = build_model("resnet20").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, "l1", example=EXAMPLE, ratio=0.5).model
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in pruned.parameters()}


@pytest.mark.parametrize(
    ("network", "variant", "params"),
    [
        ("vgg16", "A", 5397034),
        ("resnet56", "A", 773336),
        ("resnet56", "B", 735712),
        ("resnet110", "A", 1688522),
        ("resnet110", "B", 1168424),
    ],
)
def test_published_variants(network: str, variant: str, params: int) -> None:
    model = build_model(network)
    result = prune(model, "l1", example=EXAMPLE, variant=variant)
    assert count_cost(result.model, (3, 32, 32)).params == params
    for layer in result.report.layers:
        weight = model.get_parameter(f"{layer.layer}.weight").detach()
        best = weight.abs().sum((1, 2, 3)).topk(layer.kept).indices.sort().values
        kept = result.model.get_parameter(f"{layer.layer}.weight")
        # The input side may be narrower, so compare what both hold: VGG prunes it, the ResNets' first convs do not.
        if kept.shape[1] == weight.shape[1]:
            assert torch.equal(kept, weight[best])


def test_only_first_convolutions_of_blocks_are_touched_in_a_resnet() -> None:
    result = prune(build_model("resnet20"), "l1", example=EXAMPLE, ratio=0.5)
    assert [layer.layer for layer in result.report.layers] == [
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)
    ]


def test_scope_all_prunes_the_streams_as_well_and_the_network_still_runs() -> None:
    model = build_model("resnet20")
    inner = prune(model, "l1", example=EXAMPLE, ratio=0.5)
    coupled = prune(model, "l1", example=EXAMPLE, ratio=0.5, scope="all")
    assert count_cost(coupled.model, (3, 32, 32)).macs < 0.6 * count_cost(inner.model, (3, 32, 32)).macs
    assert coupled.model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_linear_layers_are_left_alone() -> None:
    result = prune(build_model("vgg11"), "l1", example=EXAMPLE, ratio=0.5)
    assert result.model.get_parameter("classifier.0.weight").shape == (512, 256)
    assert len(result.report.layers) == 8


def test_floor_rounding_and_skips() -> None:
    result = prune(
        build_model("vgg11"), "l1", example=EXAMPLE, ratio=0.9, min_channels=20, round_to=8, skip=["features.0"]
    )
    assert [layer.kept for layer in result.report.layers] == [64, 24, 32, 32, 56, 56, 56, 56]


def test_a_network_without_free_channels_is_refused_with_the_reasons() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x)

    with pytest.raises(UserError, match=r"finds no channels it can prune in Sum with scope=inner \(conv: "):
        prune(Sum(), "l1", example=EXAMPLE, ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.2}, "pruner.ratio=1.2: must be in (0, 1)"),
        ({"ratio": 0.5, "variant": "A"}, "give exactly one"),
        ({}, "no target"),
        ({"ratio": 0.5, "colour": 3}, "pruner.colour: unknown key"),
        ({"variant": "C"}, "l1 has no such variant of vgg16; there are vgg16: A; resnet56: A, B"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        prune(build_model("vgg16"), "l1", example=EXAMPLE, **options)  # type: ignore[arg-type]
    assert message in str(error.value)


OWN = '''
import torch
from rethink_prune.pruning import ChannelPruner, Pruner

class LastChannels(ChannelPruner):
    """Removes the channels with the highest indexes."""

    def scores(self, model, groups, *, data, generator):
        return {group.name: -torch.arange(group.size, dtype=torch.float64) for group in groups}

class Broken(ChannelPruner):
    def scores(self, model, groups, *, data, generator):
        return {group.name: torch.full((group.size,), float("nan")) for group in groups}

class Empty(ChannelPruner):
    def scores(self, model, groups, *, data, generator):
        return {}

class NoScores(ChannelPruner):
    pass

class FirstDocumentation(Pruner):
    def scores(self, model, groups, *, data, generator):
        return {group.name: -torch.arange(group.size, dtype=torch.float64) for group in groups}

class OwnCut(Pruner):
    def prune(self, model, target, *, data, generator):
        return target.cut(model, target.choose({group.name: -torch.arange(group.size) for group in target.groups}))

def function():
    pass
'''


def test_a_pruner_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pruner.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model = build_model("vgg11")
    result = prune(model, "my_pruner:LastChannels", example=EXAMPLE, ratio=0.5)
    assert torch.equal(result.model.get_parameter("features.0.weight"), model.get_parameter("features.0.weight")[:32])
    with pytest.raises(UserError, match=r"scores of features\.0 must be a tensor of 64 finite numbers"):
        prune(model, "my_pruner:Broken", example=EXAMPLE, ratio=0.5)
    with pytest.raises(UserError, match="must return a mapping with just these keys: features"):
        prune(model, "my_pruner:Empty", example=EXAMPLE, ratio=0.5)
    for name in ("function", "Pruner", "ChannelPruner", "NoScores"):
        with pytest.raises(UserError, match=r"must be a subclass of .* that defines scores"):
            find_pruner(f"my_pruner:{name}")


@pytest.mark.parametrize("name", ["FirstDocumentation", "OwnCut"])
def test_a_pruner_written_when_every_pruner_scored_channels_goes_on_working(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"older_{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model = build_model("vgg11")
    old, new = (
        prune(model, f"older_{name}:{each}", example=EXAMPLE, ratio=0.5).model.state_dict()
        for each in (name, "LastChannels")
    )
    assert all(torch.equal(old[key], new[key]) for key in new)
    found = find_pruner(f"older_{name}:{name}")
    assert (found.__module__, found.__name__) == (f"older_{name}", name), "its file decides the keys of stages"
    (record,) = (record for record in caplog.records if "ChannelPruner" in record.getMessage())
    assert name in record.getMessage()


def test_ranked_together_no_layer_goes_for_its_fan_in() -> None:
    """Drawn anew, no layer is worth less than another: raw sums would leave 3 of 16 first, and 64 of 64 last."""
    kept: dict[str, list[float]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        found = prune(build_model("resnet20"), "l1", example=torch.zeros(1, 3, 32, 32), ratio=0.5, ranking="global")
        for layer in found.report.layers:
            kept.setdefault(layer.layer, []).append(layer.kept / layer.full)
    shares = [sum(values) / len(values) for values in kept.values()]
    assert 0.35 < min(shares) <= max(shares) < 0.65
