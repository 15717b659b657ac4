"""Which channels remain is kept with the architecture: other weights are cut alike, and two cuts are one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness import randomise
from rethink_prune import build_model
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply, reshape

EXAMPLE = torch.zeros(1, 3, 32, 32)
# With padded shortcuts, with a flatten, with concatenation, with groups.
NETWORKS = [
    ("resnet20", "all"),
    pytest.param("preresnet20", "all", marks=pytest.mark.slow),
    ("vgg11", "inner"),
    pytest.param("densenet40", "all", marks=pytest.mark.slow),
    pytest.param("resnext29", "all", marks=pytest.mark.slow),
]


def build(name: str, seed: int) -> nn.Module:
    return randomise(build_model(name), seed)


def drop_every(step: int, model: nn.Module, scope: str) -> dict[str, list[int]]:
    groups = analyse(model, EXAMPLE.double()).groups(scope)
    return {group.name: list(range(0, group.size, step)) for group in groups if group.size > 1}


@pytest.mark.parametrize(("name", "scope"), NETWORKS)
def test_other_weights_are_cut_at_the_same_channels(name: str, scope: str, tmp_path: Path) -> None:
    trained, initial = build(name, 0), build(name, 1)
    channels = analyse(trained, EXAMPLE.double())
    plan = channels.plan(drop_every(3, trained, scope))
    _, architecture = apply(trained, plan)
    architecture.save(tmp_path)
    ticket = reshape(initial, Architecture.load(tmp_path))
    expected, _ = apply(initial, plan)
    assert architecture.has_positions
    assert ticket.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ticket.state_dict()[key], tensor), key


@pytest.mark.parametrize(("name", "scope"), NETWORKS)
def test_two_cuts_are_one(name: str, scope: str) -> None:
    model = build(name, 0)
    first = drop_every(3, model, scope)
    once, architecture = apply(model, analyse(model, EXAMPLE.double()).plan(first))
    second = drop_every(2, once, scope)
    twice, then = apply(once, analyse(once, EXAMPLE.double()).plan(second))
    both = then.after(architecture)

    # What is dropped in all, in terms of the unpruned network.
    whole = {group.name: group.size for group in analyse(model, EXAMPLE.double()).groups(scope)}
    dropped = {}
    for group, size in whole.items():
        left = [unit for unit in range(size) if unit not in first.get(group, [])]
        gone = {left[unit] for unit in second.get(group, [])}
        dropped[group] = sorted({*first.get(group, []), *gone})
    expected, direct = apply(model, analyse(model, EXAMPLE.double()).plan(dropped))

    assert both.modules == direct.modules
    assert both.edits == direct.edits
    for table in ("outputs", "inputs", "selections"):
        found, wanted = getattr(both, table), getattr(direct, table)
        assert found.keys() == wanted.keys(), table
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), table
    rebuilt = reshape(model, both)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(twice.state_dict()[key], tensor), key
        assert torch.equal(rebuilt.state_dict()[key], tensor), key
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), twice(x))


def test_masks_are_joined_in_the_final_shape() -> None:
    first = Architecture(masks={"0.weight": torch.tensor([[True, False], [True, True], [False, True]])})
    then = Architecture(
        {"0": {"out_features": 2}},
        masks={"0.weight": torch.tensor([[True, True], [True, False]])},
        outputs={"0": torch.tensor([0, 2])},
    )
    assert then.after(first).masks["0.weight"].tolist() == [[True, False], [False, False]]


def test_positions_do_not_decide_equality_and_are_optional_on_disk(tmp_path: Path) -> None:
    plain = Architecture({"0": {"out_features": 2}})
    placed = Architecture({"0": {"out_features": 2}}, outputs={"0": torch.tensor([1, 3])})
    assert plain == placed
    assert (plain.has_positions, placed.has_positions) == (False, True)
    plain.save(tmp_path)
    assert "outputs" not in (tmp_path / "architecture.json").read_text(), "as earlier versions wrote it"
    assert not Architecture.load(tmp_path).has_positions


@pytest.mark.parametrize("positions", [[0], [0, 8], [-1, 2]])
def test_positions_that_do_not_fit_are_refused(positions: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 8))
    architecture = Architecture({"0": {"out_features": 2}}, outputs={"0": torch.tensor(positions)})
    with pytest.raises(UserError, match="0: its outputs must be 2 positions between 0 and 7"):
        reshape(model, architecture)
