"""A network that was pruned once is pruned again, by the same pruner: same layers, fewer units, the same cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from harness import mask, randomise
from rethink_prune import count_cost
from rethink_prune.config import parse_pruner
from rethink_prune.models.densenet import DenseNet
from rethink_prune.models.preresnet import PreResNet
from rethink_prune.models.resnet import ResNet
from rethink_prune.models.resnext import ResNeXt
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import PRUNERS, find_pruner
from rethink_prune.pruning.channel_pruner import Channelwise
from rethink_prune.seeds import derive_generator
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import reshape

SHAPE = (3, 16, 16)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: VGG((8, "M", 16, 16), hidden_features=16),
    "resnet": lambda: ResNet(8),
    "preresnet": lambda: PreResNet(11),
    "densenet": lambda: DenseNet(10, growth_rate=4),
    "resnext": lambda: ResNeXt(11, cardinality=4, base_width=4),
}
IN_ROUNDS = [name for name, found in PRUNERS.items() if found.in_rounds and issubclass(found, Channelwise)]
OPTIONS: dict[str, dict[str, Any]] = {
    "thinet": {"entries_per_image": 20},
    "regression": {"positions_per_image": 20},
    "taylor": {"images": 20},
    "torch_pruning": {"images": 20},
}


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(60, *SHAPE, generator=generator, dtype=torch.float64), torch.arange(60) % 10)]


def test_who_prunes_in_rounds() -> None:
    assert set(IN_ROUNDS) == {"l1", "thinet", "regression", "taylor", "fpgm", "random", "torch_pruning"}
    assert {name for name, found in PRUNERS.items() if found.in_rounds} == {*IN_ROUNDS, "magnitude", "lamp"}
    assert not any(found.in_rounds and (found.trains_sparse or found.at_start) for found in PRUNERS.values())
    for name, found in PRUNERS.items():
        assert found.in_rounds or "its class does not say" not in found.no_rounds, f"{name} says why not"


# One of them everywhere, the others where much can go wrong: padded shortcuts, selections, concatenations.
CASES = [
    *(("l1", network, scope) for network in NETWORKS for scope in ("inner", "all")),
    *(
        # Torch-Pruning does not follow padded shortcuts.
        pytest.param(
            name,
            network,
            "inner" if name == "torch_pruning" else "all",
            marks=() if network == "resnet" else pytest.mark.slow,
        )
        for name in IN_ROUNDS
        if name != "l1"
        for network in ("resnet", "preresnet", "densenet")
    ),
]


@pytest.mark.parametrize(("name", "network", "scope"), CASES)
def test_what_is_pruned_is_pruned_again(name: str, network: str, scope: str) -> None:
    model, data = randomise(NETWORKS[network]()), images()
    found: Any = find_pruner(name)
    groups = analyse(model, torch.zeros(1, *SHAPE), selecting=found.selecting).groups(scope)
    # So few images cannot reconstruct what reads more channels than there are images.
    wide = [group.name for group in groups if group.size > 60] if name == "regression" else []
    options = {"name": name, "ratio": 0.4, "scope": scope, "skip": wide, **OPTIONS.get(name, {})}
    pruner: Any = found(parse_pruner(options, found.options_type))

    current, before = model, pruner.target(model, torch.zeros(1, *SHAPE), network)
    frozen, names = before.channels.frozen, [group.name for group in before.groups]
    reports = []
    for _ in range(2):
        target = pruner.target(current, torch.zeros(1, *SHAPE), network)
        # Groups keep their names, so that patterns, reports and reshuffled tickets mean the same layers.
        assert [group.name for group in target.groups] == names
        assert target.channels.frozen == frozen
        result = pruner.prune(current, target, data=data, generator=derive_generator(0, "prune"))
        reports.append({layer.layer: layer for layer in result.report.layers})
        assert count_cost(result.model, SHAPE) == target.cost, "what was planned is what came out"
        rebuilt = reshape(current, result.architecture)
        rebuilt.load_state_dict(result.model.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt.eval()(data[0][0]), result.model.eval()(data[0][0]))
        current = result.model
    for layer, second in reports[1].items():
        assert second.full == reports[0][layer].kept
        assert second.kept == (second.full if layer in wide else max(1, int(second.full * 0.6 + 1e-9)))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_second_cut_is_exact(network: str) -> None:
    model, data = randomise(NETWORKS[network]()), images()
    found = find_pruner("l1")
    pruner: Any = found(parse_pruner({"name": "l1", "ratio": 0.4, "scope": "all"}, found.options_type))
    generator = torch.Generator()
    first = pruner.prune(model, pruner.target(model, torch.zeros(1, *SHAPE)), data=None, generator=generator).model
    target = pruner.target(first, torch.zeros(1, *SHAPE))
    choice = target.choose(pruner.scores(first, target.groups, data=None, generator=generator))
    with torch.no_grad():
        masked, cut = mask(first, target.channels, choice.drop)(data[0][0]), target.cut(first, choice).model(data[0][0])
    assert (masked - cut).abs().max() < 1e-10


def test_inputs_that_a_branch_selects_are_counted_in_the_whole_stream() -> None:
    """Regression lets the convolutions that start a branch read some channels of a stream; a second round, fewer."""
    model, data = randomise(PreResNet(11)), images()
    found = find_pruner("regression")
    options = {"name": "regression", "ratio": 0.4, "positions_per_image": 20}
    pruner: Any = found(parse_pruner(options, found.options_type))
    current, selections = model, []
    for _ in range(2):
        target = pruner.target(current, torch.zeros(1, *SHAPE))
        result = pruner.prune(current, target, data=data, generator=torch.Generator().manual_seed(0))
        current = result.model
        selections.append({name: set(indexes.tolist()) for name, indexes in result.architecture.selections.items()})
    assert selections[0]
    assert selections[0].keys() == selections[1].keys()
    assert all(selections[1][name] < kept for name, kept in selections[0].items())
