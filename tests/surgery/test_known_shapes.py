"""What is planned before scores are known is what any scores cut: shapes and cost do not depend on which units go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.config import ChannelOptions
from rethink_prune.cost import count_cost
from rethink_prune.pruning.l1 import L1
from rethink_prune.surgery.cut import reshape


class Sliced(nn.Module):
    """Layers whose channels are taken apart at random places, for readers of unequal width; drawn by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def pick(*choices: int) -> int:
            return choices[int(torch.randint(len(choices), (), generator=draw))]

        self.kind = pick(0, 1, 2, 3, 4)
        self.width = pick(8, 12, 16)
        self.bounds = sorted(int(b) for b in 1 + torch.randperm(self.width - 1, generator=draw)[:2])
        self.stem, self.norm = nn.Conv2d(3, self.width, 3, padding=1), nn.BatchNorm2d(self.width)
        sizes = [part.shape[1] for part in self.parts(torch.zeros(1, self.width, 1, 1))]
        self.branches = nn.ModuleList(nn.Conv2d(size, pick(4, 6, 20), pick(1, 3), padding="same") for size in sizes)
        joined = sum(branch.out_channels for branch in self.branches)
        self.inner = nn.Conv2d(joined + sizes[0] * pick(0, 1), 10, 1)
        self.keeps_first = self.inner.in_channels > joined
        self.head = nn.Linear(10 * 4, 5)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        first, second = self.bounds
        match self.kind:
            case 0:
                left, right = x.chunk(2, 1)
                return [left, right]
            case 1:
                left, right = x.split([first, self.width - first], 1)
                return [left, right]
            case 2:  # some channels are read twice, some by nobody
                return [x[:, :second], x[:, first : second + 1]]
            case 3:
                return [x.narrow(1, 0, first), x, x[:, first:]]
            case _:
                left, middle, right = torch.split(x, [first, second - first, self.width - second], dim=1)
                return [left, middle, right]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.parts(torch.relu(self.norm(self.stem(x))))
        outputs = [torch.relu(branch(part)) for branch, part in zip(self.branches, parts, strict=True)]
        x = self.inner(torch.cat([*outputs, parts[0]] if self.keeps_first else outputs, 1))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_any_scores_cut_what_is_planned(seed: int, ratio: float) -> None:
    model, example = Sliced(seed).eval(), torch.zeros(1, 3, 6, 6)
    aim = L1(ChannelOptions(name="l1", ratio=ratio)).target(model, example, "sliced")
    assert aim.known
    generator = torch.Generator().manual_seed(seed)
    planned = shapes(reshape(model, aim.architecture()))
    for _ in range(3):
        result = aim.cut(model, aim.choose({g.name: torch.rand(g.size, generator=generator) for g in aim.groups}))
        assert shapes(result.model) == planned
        assert count_cost(result.model, (3, 6, 6)) == aim.cost
        assert result.architecture == aim.architecture()


@pytest.mark.parametrize("seed", range(5))
def test_a_global_ranking_empties_no_reader(seed: int) -> None:
    model = Sliced(seed).eval()
    aim = L1(ChannelOptions(name="l1", ratio=0.7, ranking="global")).target(model, torch.zeros(1, 3, 6, 6), "sliced")
    # The worst case: all that one reader needs is worth least.
    scores = {group.name: torch.arange(group.size) + 100.0 * index for index, group in enumerate(aim.groups)}
    result = aim.cut(model, aim.choose(scores))
    assert result.model(torch.zeros(1, 3, 6, 6)).shape == (1, 5)
