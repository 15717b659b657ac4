"""What a trace does not show, and what a network's class does: left whole, kept, or refused."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rethink_prune.copying import copy_network
from rethink_prune.errors import UserError
from rethink_prune.state import full_state
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channels import analyse
from rethink_prune.surgery.cut import apply, reshape


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.third, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.last(self.third(x)).mean((2, 3))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign() + x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class WithSign(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Sign.apply(self.first(x))
        return self.last(torch.relu(self.norm(self.second(x)))).mean((2, 3))


def hook(model: Chain) -> None:
    model.first.register_forward_hook(lambda module, args, output: output.sigmoid())


def pre_hook(model: Chain) -> None:
    model.second.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def replaced_forward(model: Chain) -> None:
    plain = model.first.forward
    model.first.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]


def old_weight_norm(model: Chain) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.first)


def pruned_by_torch(model: Chain) -> None:
    prune.random_unstructured(model.first, "weight", 0.5)


def lock(model: Chain) -> None:
    model.first.lock = threading.Lock()  # type: ignore[assignment]


CHANGES: dict[Callable[[Chain], None], str] = {
    hook: "first: has a forward hook",
    pre_hook: "second: has a forward hook",
    replaced_forward: "first: its forward was replaced",
    old_weight_norm: "first: has a forward hook",
    pruned_by_torch: "first: has a forward hook",
    lock: "first: holds lock, which cannot be copied",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_module_is_left_whole_and_listed_and_the_rest_is_exact(change: Callable[[Chain], None]) -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    change(model)
    x = torch.randn(2, 3, 12, 12)
    before = model(x).detach()
    channels = analyse(model, x)
    reason = CHANGES[change]
    assert any(warning.startswith(reason) for warning in channels.warnings)
    assert reason.partition(":")[0] in channels.frozen
    drop = {group.name: [0, 3] for group in channels.groups()}
    assert drop, "the rest can be pruned"
    pruned, architecture = apply(model, channels.plan(drop))
    for group in channels.groups():
        with torch.no_grad():
            for name in (*group.layers, *group.norms):
                for parameter in model.get_submodule(name).parameters(recurse=False):
                    parameter[[0, 3]] = 0
    assert torch.allclose(pruned(x), model(x), atol=1e-5)
    assert not torch.allclose(model(x), before)
    assert reshape(model, architecture)(x).shape == before.shape


def test_a_hook_may_give_an_activation_another_shape() -> None:
    """Shapes are those that the hook gives, also of modules that are not run to know theirs."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[1].register_forward_hook(lambda module, args, output: torch.cat([output, output], 1))
    x = torch.randn(2, 3, 4, 4)
    channels = analyse(model, x)
    assert set(channels.frozen) == {"0", "4"}
    assert apply(model, channels.plan({"2": [0]}))[0](x).shape == model(x).shape


def test_a_buffer_that_is_called_like_a_selection_is_the_networks_own() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].register_buffer("selected", torch.tensor([3.0]), persistent=False)
    assert full_state(model)["0.selected"].tolist() == [3.0]


def test_an_autograd_function_is_one_call_without_a_rule() -> None:
    model, x = WithSign().eval(), torch.randn(2, 3, 12, 12)
    channels = analyse(model, x)
    assert "first" in channels.frozen
    assert any("apply" in warning for warning in channels.warnings)


def test_the_networks_own_forward_may_not_be_replaced() -> None:
    model = Chain()
    plain = model.forward
    model.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    with pytest.raises(UserError, match="Chain: its forward was replaced on the instance"):
        analyse(model, torch.zeros(1, 3, 12, 12))


def test_a_copy_shares_no_weights_through_functions() -> None:
    model, x = Chain().eval(), torch.randn(2, 3, 12, 12)
    replaced_forward(model)
    model.norm.register_forward_hook(lambda module, args, output: output * model.last.weight.mean())
    copied = copy_network(model)
    before = copied(x).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)


class Sliced(Chain):
    """Its graph has to be edited, and its class does more than a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.name = "kept"
        self.seen = 0
        self.register_forward_hook(lambda module, args, output: output * 2)

    def train(self, mode: bool = True) -> Sliced:
        super().train(mode)
        self.norm.eval()
        return self

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = int(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.cat([x[:, 3:], x[:, :3]], 1)
        x = torch.relu(self.norm(self.second(x)))
        return self.last(x + self.shortcut(x)).mean((2, 3))


def test_all_that_a_class_does_stays_after_surgery() -> None:
    model, x = Sliced().eval(), torch.randn(2, 3, 12, 12)
    model.seen = 7
    channels = analyse(model, x)
    drop = {group.name: [0] for group in channels.groups()}
    pruned, architecture = apply(model, channels.plan(drop))
    assert architecture.edits, "the case asks for a class of its own"
    without_branch = remove_branches(model, ["shortcut"])
    for result in (pruned, reshape(model, architecture), without_branch):
        assert isinstance(result, Sliced)
        assert type(result).__name__ == "Sliced"
        result.train()
        assert result.first.training
        assert not result.norm.training
        assert result.name == "kept"
        assert result.state_dict()["_extra_state"] == 7
        assert len(result._forward_hooks) == 1
    # In training mode, too, what runs is the edited graph.
    assert pruned.train()(x).shape == (2, 4)


class Halves(Chain):
    """A constant counts channels, so the graph would have to be edited, and a step of the forward pass is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(1))
        self.passes = [0]

    def hidden(self) -> Any:
        return 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(torch.cat([x[:, 3:], x[:, :3]], 1))))
        return self.last(x + self.hidden() * self.third(x)).mean((2, 3))


class DrawsNumber(Halves):
    def hidden(self) -> Any:
        return random.random() if self.training else 1


class DrawsTensor(Halves):
    def hidden(self) -> Any:
        return torch.rand(1) + 1 if self.training else 1


class SkipsAtRandom(Halves):
    def hidden(self) -> Any:
        return 3 if torch.rand(1).item() < 0.5 and self.training else 1


class ComputesWithBuffer(Halves):
    def hidden(self) -> Any:
        return self.level.exp()


class ChangesBuffer(Halves):
    def hidden(self) -> Any:
        if self.training:
            self.level.add_(1)
        return self.level


class CountsPasses(Halves):
    def hidden(self) -> Any:
        self.passes[0] += 1
        return self.passes[0]


HIDDEN = (DrawsNumber, DrawsTensor, SkipsAtRandom, ChangesBuffer, CountsPasses)


@pytest.mark.parametrize("network", HIDDEN, ids=lambda network: network.__name__)
def test_no_graph_stands_for_a_forward_pass_with_hidden_steps(network: type[Halves]) -> None:
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(2, 3, 12, 12)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    channels = analyse(model, x)
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert "counts channels, and " in channels.frozen["first"]
    model(x)  # a pruner evaluates the network before it cuts
    drop = {group.name: [0, 3] for group in channels.groups("all")}
    assert drop, "the rest can be pruned"
    pruned, architecture = apply(model, channels.plan(drop))
    assert not architecture.edits
    # What is pruned still does what its class says.
    level = model.level.clone()
    outputs = [pruned.train()(x) for _ in range(8)]
    assert any(not torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(pruned.get_buffer("level"), level + (8 if network is ChangesBuffer else 0))
    with pytest.raises(UserError, match="no block can be removed: "):
        remove_branches(model, ["third"])


def test_a_graph_without_hidden_steps_is_edited() -> None:
    model, x = Halves().eval(), torch.randn(2, 3, 12, 12)
    channels = analyse(model, x)
    drop = {group.name: [0] for group in channels.groups("all")}
    assert apply(model, channels.plan(drop))[1].edits
    remove_branches(model, ["third"])


class Centred(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x - x.mean(1, keepdim=True)


class Scaled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.num_features


class ShuffledInTraining(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x.flip(1) if self.training else x


class Leaky(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(super().forward(x))


@pytest.mark.parametrize("norm", [Centred, Scaled, ShuffledInTraining, Leaky], ids=lambda norm: norm.__name__)
def test_a_norm_of_ones_own_may_mix_channels(norm: type[nn.BatchNorm2d]) -> None:
    model, x = Chain(), torch.randn(2, 3, 12, 12)
    model.norm = norm(8)
    channels = analyse(model, x)
    if norm is Leaky:
        assert "second" not in channels.frozen
        assert [list(group.norms) for group in channels.groups() if group.name == "second"] == [["norm"]]
    else:
        assert (
            channels.frozen["second"] == f"norm: {norm.__name__} computes a channel from others, or from their number"
        )
