"""Attention, parameters that no layer owns, and networks that only ``torch.export`` can follow."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import mask, randomise
from rethink_prune import build_model, count_cost, prune
from rethink_prune.cost import on_meta
from rethink_prune.errors import UserError
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply, reshape
from rethink_prune.surgery.exported import export_graph

Compare = Callable[..., tuple[Channels, nn.Module]]

DIM, HEADS, WIDTH = 12, 3, 4
TOKENS = (2, 5, DIM)


class Block(nn.Module):
    """A block of a transformer, whose attention is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, 4)
        self.build()

    def build(self) -> None:
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((x + self.attend(self.norm(x))).mean(1))


class Fused(Block):
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class HeadsFirst(Block):
    """Queries, keys and values of a head stand side by side."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, dim=-1)
        attention = torch.softmax(q @ k.transpose(-2, -1) * WIDTH**-0.5, dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Between(Block):
    """Queries, keys and values stand between the heads and their widths."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, HEADS, 3, WIDTH).unbind(3)
        attention = torch.einsum("nqhd, nkhd -> nhqk", q, k).softmax(-1)
        return self.proj(torch.einsum("nhqk, nkhd -> nqhd", attention, v).reshape(n, t, DIM))


class Separate(Block):
    """Three layers, norms of queries and keys, a bias for each head from a table, and a temperature for each."""

    def build(self) -> None:
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.register_buffer("index", torch.arange(25) % 9)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, HEADS, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attention = self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) * self.temperature.exp()
        attention = attention + self.table[self.index].view(t, t, HEADS).permute(2, 0, 1).unsqueeze(0)
        return self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Joint(Block):
    """Torch's own attention, of which torch.fx makes one operation."""

    def build(self) -> None:
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Gated(Block):
    """Hidden units with a gate, as SwiGLU has."""

    def build(self) -> None:
        self.fc1, self.fc2 = nn.Linear(DIM, 16), nn.Linear(8, DIM)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class SingleHead(Block):
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("network", [Fused, HeadsFirst, Between, Separate, Joint], ids=lambda n: n.__name__)
def test_heads_go_as_a_whole(network: type[Block], pruned_equals_masked: Compare) -> None:
    channels, pruned = pruned_equals_masked(network(), TOKENS, share=0.4)
    (group,) = channels.groups()
    assert (group.kind, group.size) == ("heads", HEADS)
    assert all(len(positions) % WIDTH == 0 for unit in group.units for positions in unit.values())
    (reader,) = channels.inputs(group)
    assert [len(places) for places in channels.inputs(group)[reader]] == [WIDTH] * HEADS
    assert pruned.train()(torch.randn(7, 5, DIM, dtype=torch.float64)).shape == (7, 4), "any number of images"
    full, cut = (sum(p.numel() for p in model.parameters()) for model in (network(), pruned))
    assert cut < full - 4 * WIDTH * DIM


@pytest.mark.parametrize("network", [Fused, HeadsFirst, Separate, Joint], ids=lambda n: n.__name__)
def test_widths_go_alike_in_all_heads(network: type[Block], pruned_equals_masked: Compare) -> None:
    if network is Separate:
        channels = analyse(network(), torch.zeros(TOKENS), attention="widths")
        # A norm over the widths of queries and keys keeps these; those of values may go.
        assert [group.layers for group in channels.groups()] == [("v",)]
    channels, _ = pruned_equals_masked(network(), TOKENS, attention="widths")
    assert all(group.kind == "heads" and group.size == WIDTH for group in channels.groups())


def test_without_the_option_widths_stay(pruned_equals_masked: Compare) -> None:
    channels, _ = pruned_equals_masked(Fused(), TOKENS, drop={"qkv": [1]})
    with pytest.raises(UserError, match="units to drop must be between 0 and 2"):
        channels.plan({"qkv": [3]})


def test_gated_units_go_with_their_gates(pruned_equals_masked: Compare) -> None:
    channels, _ = pruned_equals_masked(Gated(), TOKENS)
    (group,) = channels.groups()
    assert (group.kind, group.size, group.units[1]) == ("tokens", 8, {"fc1": (1, 9)})


def test_channels_of_a_single_head_go_one_by_one(pruned_equals_masked: Compare) -> None:
    channels, _ = pruned_equals_masked(SingleHead(), TOKENS)
    assert {group.name: group.size for group in channels.groups()} == {"qkv": 12, "qkv#2": 12}


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torchs_transformer_are_pruned(batch_first: bool, pruned_equals_masked: Compare) -> None:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 16, batch_first=batch_first, activation="gelu", norm_first=True)
    model = nn.Sequential(nn.Linear(6, DIM), layer, nn.Flatten(), nn.Linear(5 * DIM, 2))
    if not batch_first:
        model = nn.Sequential(nn.Linear(6, DIM), layer, nn.Linear(DIM, 2))
    channels, pruned = pruned_equals_masked(model, (4, 5, 6))
    assert [(group.name, group.kind) for group in channels.groups()] == [
        ("1.self_attn", "heads"),
        ("1.linear1", "tokens"),
    ]
    assert list(pruned.state_dict()) == list(model.state_dict()), "the modules' names stay"


def test_a_network_is_rebuilt_from_its_files(tmp_path: Path) -> None:
    x = torch.randn(TOKENS)
    for network in (Fused, Separate, Joint):
        model = network().eval()
        channels = analyse(model, x)
        pruned, architecture = apply(model, channels.plan({channels.groups()[0].name: [0]}))
        architecture.save(tmp_path)
        for loaded in (Architecture.load(tmp_path), Architecture.load(tmp_path).without_positions()):
            rebuilt = reshape(network(), loaded).eval()
            rebuilt.load_state_dict(pruned.state_dict())
            assert torch.equal(rebuilt(x), pruned(x))
        inherited = reshape(model, Architecture.load(tmp_path))
        assert torch.equal(inherited(x), pruned(x)), "positions are those of the weights"


def test_an_architecture_of_another_network_is_refused() -> None:
    architecture = Architecture(parameters={"table": {"1": 4}})
    with pytest.raises(UserError, match="table: dimension 1 of size 4: must be between 1 and 3, its full size"):
        architecture.check_fits(Separate())


@pytest.mark.parametrize("network", [Fused, Separate, Joint], ids=lambda n: n.__name__)
def test_two_cuts_are_one(network: type[Block]) -> None:
    x = torch.randn(TOKENS)
    model = network().eval()
    name = analyse(model, x).groups()[0].name
    once, first = apply(model, analyse(model, x).plan({name: [0]}))
    twice, second = apply(once, analyse(once, x).plan({name: [1]}))
    together, _ = apply(model, analyse(model, x).plan({name: [0, 2]}))
    assert torch.equal(twice(x), together(x))
    rebuilt = reshape(model, second.after(first))
    assert torch.equal(rebuilt(x), together(x))


# ---- parameters that no layer owns -----------------------------------------------------------------------


class Scaled(nn.Module):
    """A convolution between two, with parameters of its own for each channel, as LayerScale has."""

    def __init__(self, shape: tuple[int, ...], order: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), order
        self.gain = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.order(self.a(x), self.gain))


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((4, 1, 1), lambda x, gain: x * gain),
        ((1, 4, 1, 1), lambda x, gain: gain + x),
        ((4, 1, 1), lambda x, gain: torch.sigmoid(gain) * x),
        ((4,), lambda x, gain: x * gain.view(1, -1, 1, 1)),
        ((4, 6, 6), lambda x, gain: x + gain),
        ((1, 4, 1, 1), lambda x, gain: torch.cat([gain.expand(2, -1, 6, -1), x], 3)[..., 1:]),
    ],
)
def test_a_parameter_with_a_value_for_each_channel_is_cut(
    shape: tuple[int, ...], order: Callable[[Any, Any], Any], pruned_equals_masked: Compare
) -> None:
    channels, pruned = pruned_equals_masked(Scaled(shape, order), (2, 3, 6, 6))
    assert [group.name for group in channels.groups()] == ["a"]
    assert pruned.gain.numel() == pruned.b.in_channels * Scaled(shape, order).gain.numel() // 4


@pytest.mark.parametrize(
    "order",
    [lambda x, gain: x * gain.flip(0), lambda x, gain: x * gain.sum(0), lambda x, gain: x * gain + gain.sort(0).values],
)
def test_what_is_computed_from_a_parameter_by_other_rules_stays_whole(
    order: Callable[[Any, Any], Any], pruned_equals_masked: Compare
) -> None:
    channels, _ = pruned_equals_masked(Scaled((4, 1, 1), order), (2, 3, 6, 6))
    free = [group.name for group in channels.groups("all")]
    assert free == (["a"] if order(torch.ones(4, 1, 1), torch.ones(4, 1, 1)).max() == 4 else [])


class Embedded(nn.Module):
    """A class token and a position embedding before a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, DIM), nn.LayerNorm(DIM), nn.Linear(DIM, 3)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 6, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.place
        return self.head(self.norm(x)[:, 0])


def test_the_embedding_goes_only_where_asked_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Embedded(), torch.randn(2, 5, 6)
    assert analyse(model, x).groups("all") == ()
    channels = analyse(model, x, approximate=True)
    pruned, architecture = apply(model, channels.plan({"embed": [0, 5]}))
    assert architecture.parameters == {"token": {"2": 10}, "place": {"2": 10}}
    assert pruned(x).shape == (2, 3)
    assert channels.warnings == ("approximate: 1 layer norms (norm, ...) have other statistics after pruning",)
    before, masked = model(x), mask(model, channels, {"embed": [0, 5]})(x)
    assert 1e-6 < (pruned(x) - masked).abs().max() < (pruned(x) - before).abs().max(), "near, and not exact"
    rebuilt = reshape(Embedded(), architecture.without_positions())
    rebuilt.load_state_dict(pruned.state_dict())
    assert torch.equal(rebuilt(x), pruned(x))


def test_a_study_of_an_approximate_cut_warns() -> None:
    model = build_model("vit_tiny", image_size=8, patch_size=4, dim=16, depth=1, heads=2)
    options = {"example": torch.zeros(1, 3, 8, 8), "scope": "all", "ratio": 0.5}
    exact, cut = prune(model, "l1", **options), prune(model, "l1", approximate=True, **options)
    assert not any("approximate" in warning for warning in exact.report.warnings)
    assert any("approximate" in warning for warning in cut.report.warnings)
    assert (exact.model.head.in_features, cut.model.head.in_features) == (16, 8)
    with pytest.raises(UserError, match=r"approximate=true: is about channels .* which pruner.scope=all prunes"):
        prune(model, "l1", approximate=True, example=options["example"], ratio=0.5)


# ---- what only torch.export can follow -------------------------------------------------------------------


class Padded(nn.Module):
    """Pads to a multiple of four, as windows need: a decision by shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 4:
            x = F.pad(x, (0, 4 - x.shape[-1] % 4))
        x = self.drop(F.relu(self.norm(self.a(x))))
        return self.b(x.view(x.shape[0], 8, x.shape[2], -1))


def test_decisions_by_shapes_are_followed(pruned_equals_masked: Compare) -> None:
    channels, pruned = pruned_equals_masked(Padded(), (2, 3, 6, 6))
    assert channels.exported
    assert [(group.name, tuple(group.norms)) for group in channels.groups()] == [("a", ("norm",))]
    before = pruned.norm.num_batches_tracked.item()
    pruned.train()(torch.randn(5, 3, 6, 6, dtype=torch.float64)).sum().backward()
    assert pruned.norm.num_batches_tracked == before + 1
    assert all(parameter.grad is not None for parameter in pruned.parameters())


class RunsTwice(Padded):
    """Calls one layer, and one dropout, after itself."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.drop(self.again(self.again(super().forward(x)))))


def test_calls_of_one_layer_stay_apart() -> None:
    for training in (False, True):
        graph = export_graph(on_meta(RunsTwice()), (1, 3, 6, 6), training=training)
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        assert calls == ["a", "norm", "drop", "b", "again", "again", "drop", "drop"]


class CreatesZeros(Padded):
    """Creates a tensor on the CPU, which cannot meet one without values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x, torch.zeros(x.shape[0], 3, x.shape[2], 2, dtype=x.dtype)], 3))


def test_tensors_that_a_forward_pass_creates_are_followed(pruned_equals_masked: Compare) -> None:
    channels, _ = pruned_equals_masked(CreatesZeros(), (2, 3, 6, 6))
    assert channels.exported
    assert [group.name for group in channels.groups()] == ["a"]


class Counts(Padded):
    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(x) * self.passes


class Draws(Padded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * random.random()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 100


class OwnBackward(Padded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(super().forward(x))  # type: ignore[no-any-return]


class WithoutGradients(Padded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = x * 2
        return super().forward(x)


class DecidesByValues(Padded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Counts, "sets attributes"),
        (Draws, "draws random numbers"),
        (OwnBackward, "Doubled has a backward pass of its own"),
        (WithoutGradients, "runs parts without gradients"),
        (DecidesByValues, "torch.export cannot follow it"),
    ],
)
def test_what_no_graph_records_is_refused_in_one_line(
    network: type[nn.Module], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=reason) as error:
        analyse(network(), torch.randn(2, 3, 6, 6))
    assert "torch.fx cannot trace it" in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


class ComputesWithBuffer(nn.Module):
    """What it computes from a buffer alone would be computed once by torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(4 * 36, 2)
        self.register_buffer("level", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).view(-1, 144) * self.level.exp())


def test_a_graph_reads_buffers_when_it_runs(pruned_equals_masked: Compare) -> None:
    channels, pruned = pruned_equals_masked(ComputesWithBuffer(), (2, 3, 6, 6))
    assert channels.exported
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = pruned(x) - pruned.b.bias
    with torch.no_grad():
        pruned.level += 1
    assert torch.allclose(pruned(x) - pruned.b.bias, before * torch.e)


def test_attention_counts_in_the_cost() -> None:
    class OnCpu(Joint):
        """Cannot be counted without values: it creates a tensor on the CPU. Has heads for torch's short way."""

        def build(self) -> None:
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.zeros(x.shape, device="cpu"))

    tokens, batch = 5, torch.zeros(1, 5, DIM)
    for network in (Fused, HeadsFirst, Joint, OnCpu):
        layers = tokens * (4 * DIM * DIM) + DIM * 4
        products = 2 * HEADS * tokens * tokens * WIDTH
        assert count_cost(network(), tuple(batch.shape[1:])).macs == layers + products


def test_masking_a_head_is_what_pruning_it_means() -> None:
    model = randomise(Fused())
    channels, x = analyse(model, torch.zeros(TOKENS)), torch.randn(TOKENS, dtype=torch.float64)
    masked = mask(model, channels, {"qkv": [0]})
    rows = {row for row in range(3 * DIM) if not masked.qkv.weight[row].any()}
    assert rows == {part * DIM + width for part in range(3) for width in range(WIDTH)}
    assert not torch.allclose(masked(x), model(x))
