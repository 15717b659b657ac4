"""What pruners do with layers that read tokens: hidden units of MLPs, heads, projections of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from harness import mask
from rethink_prune import count_cost, prune
from rethink_prune.config import parse_pruner
from rethink_prune.cost import layer_macs, weight_macs
from rethink_prune.errors import UserError
from rethink_prune.models.vgg import VGG
from rethink_prune.pruning import find_pruner
from rethink_prune.pruning.channel_pruner import Choice
from rethink_prune.pruning.reconstruction import Reconstruction, WorkingCopy
from rethink_prune.pruning.samples import FirstImages
from rethink_prune.surgery.channels import ChannelGroup, analyse

EXAMPLE = torch.zeros(1, 3, 16, 16)
OF_CHANNELS = ("l1", "fpgm", "random", "taylor", "thinet", "regression")
DIM, HIDDEN, TOKENS = 8, 24, 17


class Attention(nn.Module):
    """Four heads with one layer for queries, keys and values."""

    def __init__(self, heads: int = 4, width: int = 2) -> None:
        super().__init__()
        self.width = width
        self.qkv, self.proj = nn.Linear(DIM, 3 * heads * width), nn.Linear(heads * width, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, tokens = x.shape[0], x.shape[1]
        q, k, v = self.qkv(x).reshape(images, tokens, 3, -1, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, -1))


class SmallViT(nn.Module):
    """A block over 16 tokens, and a classifier with a hidden layer, which reads one vector per image."""

    def __init__(self, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.norm1, self.attn = nn.LayerNorm(DIM), Attention()
        self.norm2, self.act = nn.LayerNorm(DIM), activation()
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.head = nn.Sequential(nn.Linear(DIM, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def vit() -> nn.Module:
    model = models.VisionTransformer(16, 4, 2, 2, DIM, HIDDEN, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zeros otherwise
    return model


NETWORKS: dict[str, Any] = {
    "small": SmallViT,
    "vit": vit,
    "swin": lambda: models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5),
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)], num_classes=5
    ),
}
TORCHVISION = ("vit", "swin", "convnext")
# Layer, and how many units it has.
HIDDEN_UNITS = {
    "small": {"fc1": HIDDEN},
    "vit": {f"encoder.layers.encoder_layer_{block}.mlp.0": HIDDEN for block in range(2)},
    "swin": {"features.1.0.mlp.0": 32, "features.3.0.mlp.0": 64},
    "convnext": {"features.1.0.block.3": 32, "features.3.0.block.3": 64},
}


def build(network: str = "small") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = NETWORKS[network]().double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)  # so small otherwise that no block matters
    return model


def images(count: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, *EXAMPLE.shape[1:], generator=generator, dtype=torch.float64)
    return [(pixels, torch.arange(count) % 5)]


def pruner_of(name: str, **options: Any) -> Any:
    found = find_pruner(name)
    return found(parse_pruner({"name": name, **options}, found.options_type))


@pytest.mark.parametrize("network", ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION)])
@pytest.mark.parametrize("pruner", [*OF_CHANNELS, "uniform"])
def test_hidden_units_are_pruned_and_nothing_of_the_classifier(pruner: str, network: str) -> None:
    model = build(network)
    result = prune(model, pruner, example=EXAMPLE, data=images(), ratio=0.5)
    # Only of these kinds: what attention has depends on the analysis.
    layers = {layer.layer: (layer.kept, layer.full) for layer in result.report.layers if "attn" not in layer.layer}
    layers = {name: widths for name, widths in layers.items() if "attention" not in name}
    assert layers == {name: (size // 2, size) for name, size in HIDDEN_UNITS[network].items()}
    for name, size in HIDDEN_UNITS[network].items():
        assert result.model.get_submodule(name).out_features == size // 2
    if network == "small":
        assert result.report.frozen["head.0"] == f"not for {pruner}, which leaves it alone"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("pruner", ["thinet", "regression"])
def test_the_pruned_network_is_the_repaired_one_with_units_masked(pruner: str, network: str) -> None:
    model, data = build(network), images()
    chosen = pruner_of(pruner, ratio=0.5)
    target = chosen.target(model, EXAMPLE)
    full, drop = chosen.reconstruct(
        model, target, chosen.sampled(data, target), generator=torch.Generator().manual_seed(0)
    )
    pruned = target.cut(full, Choice(drop)).model
    with torch.no_grad():
        assert (pruned(data[0][0]) - mask(full, target.channels, drop)(data[0][0])).abs().max() < 1e-10
        assert (full(data[0][0]) - model(data[0][0])).abs().max() > 1e-6, "something was rewritten"


@pytest.mark.parametrize("pruner", ["l1", "regression"])
def test_a_cost_is_met(pruner: str) -> None:
    model = build()
    full = count_cost(model, EXAMPLE.shape[1:])
    pruned = prune(model, pruner, example=EXAMPLE, data=images(), target_macs=0.85).model
    assert count_cost(pruned, EXAMPLE.shape[1:]).macs == pytest.approx(0.85 * full.macs, rel=0.02)


def test_only_keys_of_networks_with_tokens_say_so() -> None:
    assert pruner_of("l1", ratio=0.5).target(build(), EXAMPLE).resolved() == {"tokens": True}
    assert pruner_of("magnitude", ratio=0.5).target(build(), EXAMPLE).resolved() == {"tokens": True}
    # Earlier versions left the joint projections of attention whole, with linear=true as well.
    assert pruner_of("magnitude", ratio=0.5, linear=True).target(build("vit"), EXAMPLE).resolved() == {"tokens": True}
    for name in ("l1", "magnitude", "uniform"):
        convolutional = VGG((8, 16, "M", 8))
        assert pruner_of(name, ratio=0.5).target(convolutional, torch.zeros(1, 3, 4, 4)).resolved() == {}


# ---- repair ---------------------------------------------------------------------------------------------


def planted() -> nn.Module:
    """A network in which unit 5 is unit 1 again, 9 is twice unit 1, 3 is zero, and nothing reads 6."""
    torch.manual_seed(0)
    model = SmallViT(nn.ReLU).double().eval()
    with torch.no_grad():
        for tensor in (model.fc1.weight, model.fc1.bias):
            tensor[5], tensor[9], tensor[3] = tensor[1], 2 * tensor[1], 0
        # Little of each, so that they go greedily; in proportion, so that scales make up for them.
        model.fc2.weight[:, [5, 9]] = model.fc2.weight[:, [1]] / 1000
        model.fc2.weight[:, 6] = 0
    return model


@pytest.mark.parametrize(("pruner", "options"), [("thinet", {}), ("regression", {"ridge": 1e-10})])
def test_combinations_of_other_units_go_and_the_output_stays(pruner: str, options: dict[str, Any]) -> None:
    model, data = planted(), images()
    chosen = pruner_of(pruner, widths={"fc1": HIDDEN - 4}, **options)
    target = chosen.target(model, EXAMPLE)
    full, drop = chosen.reconstruct(model, target, chosen.sampled(data, target), generator=torch.Generator())
    dropped = set(drop["fc1"])
    assert {3, 6} < dropped
    assert len(dropped & {1, 5, 9}) == 2
    with torch.no_grad():
        repaired, removed = (target.cut(network, Choice(drop)).model(data[0][0]) for network in (full, model))
        assert (repaired - model(data[0][0])).abs().max() < 1e-7
        assert (removed - model(data[0][0])).abs().max() > 1e-5


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_a_repair_never_fits_the_sampled_tokens_worse_than_none(ratio: float) -> None:
    model, data = build(), images()
    # All tokens of each image; heads stay, so that the hidden units read what they read.
    chosen = pruner_of("regression", ratio=ratio, positions_per_image=TOKENS, skip=["attn.qkv"])
    target = chosen.target(model, EXAMPLE)
    full, drop = chosen.reconstruct(model, target, chosen.sampled(data, target), generator=torch.Generator())
    kept = sorted(set(range(HIDDEN)) - set(drop["fc1"]))
    read: list[torch.Tensor] = []
    model.fc2.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(data[0][0])
        x, before, after = read[0].flatten(0, 1), model.fc2.weight, full.get_parameter("fc2.weight")
        removed, repaired = (x @ before.T - x[:, kept] @ weight[:, kept].T for weight in (before, after))
    assert repaired.norm() < 0.95 * removed.norm()
    # Nothing does better on all tokens than least squares, and the ridge costs little.
    best = torch.linalg.lstsq(x[:, kept], x @ before.T).solution.T
    assert repaired.norm() < 1.05 * (x @ before.T - x[:, kept] @ best.T).norm()


# ---- heads ----------------------------------------------------------------------------------------------


class Heads:
    """Says of an analysis what it is to say of heads."""

    def inputs(self, group: ChannelGroup) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {"attn.proj": tuple((2 * head, 2 * head + 1) for head in range(4))}


def heads_of(model: nn.Module) -> ChannelGroup:
    rows = torch.arange(24).view(3, 4, 2)
    units = tuple({"attn.qkv": tuple(rows[:, head].flatten().tolist())} for head in range(4))
    return ChannelGroup("attn.qkv", "conv", ("attn.qkv",), units, {})


@pytest.mark.parametrize("pruner", ["thinet", "regression"])
def test_a_head_that_another_repeats_goes_and_the_output_stays(pruner: str) -> None:
    model, data = build(), images()
    group = heads_of(model)
    with torch.no_grad():
        for tensor in (model.attn.qkv.weight, model.attn.qkv.bias):
            tensor[list(group.units[2]["attn.qkv"])] = tensor[list(group.units[0]["attn.qkv"])]
        # Small, so that it is the one that goes greedily; in proportion, so that a scale makes up for it.
        model.attn.proj.weight[:, 4:6] = model.attn.proj.weight[:, :2] / 100
    chosen = pruner_of(pruner, ratio=0.5, **({"ridge": 1e-10} if pruner == "regression" else {}))
    run = Reconstruction(
        model, WorkingCopy(model, torch.device("cpu")), FirstImages(data, 64), torch.Generator().manual_seed(0)
    )
    readers = run.current.readers(Heads(), group)  # type: ignore[arg-type]
    (reader,) = readers
    assert (reader.layer, reader.nodes) == ("attn.proj", ("attn_proj",))
    dropped = chosen.rewrite_readers(run, group, 3, readers)
    assert dropped in ([0], [2])
    run.current.remove(group, dropped, readers)
    with torch.no_grad():
        assert (run.current.module(data[0][0]) - model(data[0][0])).abs().max() < 1e-7
        assert not run.current.module.get_parameter("attn.qkv.weight")[list(group.units[dropped[0]]["attn.qkv"])].any()


@pytest.mark.parametrize("pruner", ["thinet", "regression"])
@pytest.mark.parametrize("network", ["small", "vit", "swin"])
def test_the_layer_that_reads_heads_is_repaired(pruner: str, network: str) -> None:
    model, data = build(network), images()
    chosen = pruner_of(pruner, ratio=0.5)
    target = chosen.target(model, EXAMPLE)
    heads = [group for group in target.groups if group.kind == "heads"]
    assert len(heads) == {"small": 1, "vit": 2, "swin": 2}[network]
    run = Reconstruction(
        model,
        WorkingCopy(model, torch.device("cpu"), target.channels.graphs),
        FirstImages(data, 64),
        torch.Generator().manual_seed(0),
        target.channels.graphs,
    )
    readers = run.current.readers(target.channels, heads[0])
    dropped = chosen.rewrite_readers(run, heads[0], heads[0].size // 2, readers)
    run.current.remove(heads[0], dropped, readers)
    with torch.no_grad():
        plain = model(data[0][0])
        error = (run.current.module(data[0][0]) - plain).norm()
        masked = (mask(model, target.channels, {heads[0].name: dropped})(data[0][0]) - plain).norm()
    # One of two independent heads cannot be put together from the other, so some error stays.
    assert error < {"thinet": 1.01, "regression": 0.95}[pruner] * masked


def test_a_head_scores_the_rows_of_its_queries_keys_and_values() -> None:
    model = build()
    group = heads_of(model)
    (scores,) = pruner_of("l1", ratio=0.5).scores(model, [group], data=None, generator=torch.Generator()).values()
    expected = model.attn.qkv.weight.abs().sum(1).view(3, 4, 2).sum((0, 2))
    assert torch.allclose(scores, expected)

    # So it does where the three are one parameter of the attention.
    joint = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, 4)}).double()
    rows = [{"attention": unit["attn.qkv"]} for unit in group.units]
    same = ChannelGroup("attention", "conv", ("attention",), tuple(rows), {})
    (scores,) = pruner_of("l1", ratio=0.5).scores(joint, [same], data=None, generator=torch.Generator()).values()
    assert torch.allclose(scores, joint["attention"].in_proj_weight.abs().sum(1).view(3, 4, 2).sum((0, 2)))


def test_taylor_scores_a_hidden_unit_by_a_gate_on_it() -> None:
    model, data = build(), images(16)
    chosen = pruner_of("taylor", ratio=0.5)
    target = chosen.target(model, EXAMPLE)
    scores = chosen.scores(model, target.groups, data=data, generator=torch.Generator())["fc1"]
    gate = torch.ones(HIDDEN, dtype=torch.float64, requires_grad=True)
    model.fc1.register_forward_hook(lambda _, __, output: output * gate)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    assert gate.grad is not None
    assert torch.allclose(scores, gate.grad.square())


# ---- single weights -------------------------------------------------------------------------------------


def weights_of(model: nn.Module, *, head: bool) -> Mapping[str, torch.Tensor]:
    """The weights of convolutions and linear layers of the torchvision transformer, in_proj_weight among them."""
    found = {name: tensor for name, tensor in model.named_parameters() if name.endswith("weight") and tensor.ndim > 1}
    return {name: tensor for name, tensor in found.items() if head or not name.startswith("heads.")}


@pytest.mark.parametrize("linear", [False, True])
def test_all_projections_of_attention_are_ranked_with_the_other_layers(linear: bool) -> None:
    model = build("vit")
    result = prune(model, "magnitude", example=EXAMPLE, ratio=0.6, linear=linear)
    weights = weights_of(model, head=linear)
    assert set(result.architecture.masks) == set(weights)
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in weights
    values = torch.cat([tensor.detach().abs().flatten() for tensor in weights.values()])
    threshold = values.sort().values[int(0.6 * len(values))]
    for name, tensor in weights.items():
        assert torch.equal(result.architecture.masks[name], tensor.abs() > threshold)
        assert not result.model.get_parameter(name)[~result.architecture.masks[name]].any()
    layers = [layer.layer for layer in result.report.layers]
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj" in layers
    assert len(layers) == len(weights)


@pytest.mark.parametrize("pruner", ["lamp", "snip", "grasp"])
@pytest.mark.parametrize("network", ["vit", "swin"])
def test_every_ranking_takes_attention(pruner: str, network: str) -> None:
    result = prune(build(network), pruner, example=EXAMPLE, data=images(16), ratio=0.5)
    attention = {
        layer.layer: layer for layer in result.report.layers if "attn" in layer.layer or "attention" in layer.layer
    }
    ends = {name.rpartition(".")[2] for name in attention}
    assert ends == ({"in_proj", "out_proj"} if network == "vit" else {"qkv", "proj"})
    assert any(1 < layer.kept < layer.full for layer in attention.values())


def test_queries_keys_and_values_of_different_widths_are_layers_of_their_own() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)
            self.query = nn.Parameter(torch.randn(1, 4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(2).transpose(1, 2)
            return self.cross(self.query.expand(len(x), -1, -1), x, x)[0].mean(1)

    torch.manual_seed(0)
    result = prune(Cross(), "magnitude", example=torch.zeros(1, 3, 4, 4), ratio=0.5)
    assert [layer.layer for layer in result.report.layers] == [
        *(f"cross.{name}_proj" for name in "qkv"),
        "cross.out_proj",
    ]


@pytest.mark.parametrize("what", ["target_macs", "target_params"])
def test_the_cost_of_masked_attention_is_that_of_its_weights(what: str) -> None:
    model = build("vit")
    result = prune(model, "magnitude", example=EXAMPLE, **{what: 0.6})
    cost, full = (count_cost(model, EXAMPLE.shape[1:], masks=m) for m in (result.architecture.masks, {}))
    name = what.removeprefix("target_")
    assert getattr(cost, name) == pytest.approx(0.6 * getattr(full, name), rel=0.01)


@pytest.mark.parametrize("network", ["vit", "swin"])
def test_every_weight_of_attention_is_used_once_per_token(network: str) -> None:
    model = build(network)
    macs = weight_macs(model, layer_macs(model, EXAMPLE.shape[1:]))
    tokens = {"vit": TOKENS, "swin": 64}[network]
    first = {"vit": "encoder.layers.encoder_layer_0.self_attention.", "swin": "features.1.0.attn."}[network]
    used = {
        n: macs[n] for n, p in model.named_parameters() if n.startswith(first) and p.ndim == 2 and n.endswith("weight")
    }
    assert used == {name: tokens * model.get_parameter(name).numel() for name in used}
    assert len(used) == 2


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruner", "reason"),
    [
        ("slimming", "ranks channels by the scales of batch norms, and vit has none"),
        ("soft_filter", "prunes filters of convolutions, and vit has none that can go"),
        ("sss", "finds no channels that factors can scale in vit; it has nothing else either"),
    ],
)
@pytest.mark.parametrize("network", TORCHVISION)
def test_pruners_of_norms_and_filters_say_that_they_have_no_meaning_here(
    pruner: str, reason: str, network: str
) -> None:
    chosen = pruner_of(pruner, **({} if pruner == "sss" else {"ratio": 0.5}))
    with pytest.raises(UserError) as error:
        chosen.target(build(network), EXAMPLE, "vit")
    others = "l1, fpgm, random, taylor, thinet and regression prune hidden units and heads"
    assert str(error.value) == f"pruner.name={pruner}: {reason}, so it has no meaning there; {others}"


def test_positive_paths_end_in_a_layer_norm() -> None:
    with pytest.raises(UserError, match=r"counts positive paths, which end in norm1 \(LayerNorm\), so it has no"):
        prune(build(), "synflow", example=EXAMPLE, ratio=0.5)


@pytest.mark.parametrize("pruner", ["snip", "grasp"])
def test_a_head_of_zeros_leaves_nothing_to_rank_by(pruner: str) -> None:
    model = models.VisionTransformer(16, 4, 1, 2, DIM, HIDDEN, num_classes=5).double()
    with pytest.raises(UserError, match=f"{pruner}: every weight's gradient is zero.* a last layer of zeros"):
        prune(model, pruner, example=EXAMPLE, data=images(8), ratio=0.5)


def test_what_is_read_without_a_call_of_its_layer_is_left_whole() -> None:
    class Uncalled:
        """The analysis of attention that multiplies with the weight of its output projection."""

        def groups(self, scope: str) -> tuple[ChannelGroup, ...]:
            heads: Any = "heads"
            return (ChannelGroup("attn", heads, ("attn",), ({"attn": (0, 2, 4)}, {"attn": (1, 3, 5)}), {}),)

        def inputs(self, group: ChannelGroup) -> dict[str, tuple[tuple[int, ...], ...]]:
            return {"attn.out_proj": ((0,), (1,))}

        def output_shape(self, layer: str) -> None:
            return None

    channels: Any = Uncalled()
    for name, taken in {"l1": 1, "thinet": 0, "regression": 0}.items():
        groups, _ = pruner_of(name, ratio=0.5).find_groups(build(), channels)
        assert len(groups) == taken


def test_the_shape_of_an_output_is_that_in_evaluation_mode() -> None:
    channels = analyse(build("small"), EXAMPLE)
    assert channels.output_shape("fc1") == (1, 16, HIDDEN)
    assert channels.output_shape("head.0") == (1, 6)
    assert channels.output_shape("head") is None
