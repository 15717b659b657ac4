"""Which channels go together and which stay: every rule on a small network made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import Net
from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.surgery.channels import ChannelGroup, Channels, analyse
from rethink_prune.surgery.cut import apply

Compare = Callable[..., tuple[Channels, nn.Module]]


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def layers_of(groups: tuple[ChannelGroup, ...]) -> dict[str, tuple[str, ...]]:
    return {group.name: group.layers for group in groups}


def sizes_of(channels: Channels, scope: str = "all") -> dict[str, int]:
    return {group.name: group.size for group in channels.groups(scope)}


IMAGE = (2, 3, 6, 6)


# ---- groups of our own networks --------------------------------------------------------------------------


def test_vgg_has_a_group_per_convolution_in_order_and_one_for_the_hidden_layer() -> None:
    channels = analyse(build_model("vgg16"), torch.randn(1, 3, 32, 32))
    groups = channels.groups()
    assert [group.size for group in groups] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [512]
    assert [group.kind for group in groups] == ["conv"] * 13 + ["linear"]
    assert groups[0].units[5] == {"features.0": (5,)}
    assert groups[0].norms == {"features.1": tuple((i,) for i in range(64))}
    assert channels.groups("all") == groups
    assert channels.frozen == {"classifier.3": "network output"}
    assert channels.warnings == ()
    assert channels.consumers("features.0") == ("features.3",)


def test_resnet_inner_groups_are_the_first_convolution_of_each_block() -> None:
    channels = analyse(build_model("resnet20"), torch.randn(1, 3, 32, 32))
    inner = channels.groups("inner")
    assert [group.name for group in inner] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert all(group.layers == (group.name,) for group in inner)
    assert channels.consumers("layer1.0.conv1") == ("layer1.0.conv2",)
    assert channels.warnings == ()


def test_padded_shortcuts_make_one_coupled_group_per_set_of_layers() -> None:
    channels = analyse(build_model("resnet20"), torch.randn(1, 3, 32, 32))
    coupled = [group for group in channels.groups("all") if group not in channels.groups("inner")]
    # Zero channels are appended: the first 16 run through all stages, the next 16 from the second stage on.
    assert [(group.name, group.size, len(group.layers)) for group in coupled] == [
        ("conv1", 16, 10),
        ("layer2.0.conv2", 16, 6),
        ("layer3.0.conv2", 32, 3),
    ]
    assert coupled[1].units[0] == {f"layer{stage}.{block}.conv2": (16,) for stage in (2, 3) for block in range(3)}
    assert channels.consumers("conv1")[:2] == ("layer1.0.conv1", "layer1.1.conv1")


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("name", ["vgg11", "vgg16", "resnet20", "resnet56"])
def test_pruned_equals_masked_on_our_networks(pruned_equals_masked: Compare, name: str, scope: str, size: int) -> None:
    model = build_model(name)
    _, pruned = pruned_equals_masked(model, (2, 3, size, size), scope=scope)
    share = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert share < (0.35 if scope == "all" or name.startswith("vgg") else 0.55)


def test_detached_shortcuts_are_followed(pruned_equals_masked: Compare) -> None:
    channels, _ = pruned_equals_masked(build_model("resnet20", detach_shortcut=True), (2, 3, 16, 16))
    assert len(channels.groups("all")) == 12


# ---- what goes together ----------------------------------------------------------------------------------


def test_addition_ties_positions_and_is_left_out_of_inner(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(F.relu(m.a(x) + m.norm(m.b(x)))),
        a=conv(3, 4),
        b=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        out=conv(4, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [1, 3]})
    (group,) = channels.groups("all")
    assert channels.groups("inner") == ()
    assert group.units[2] == {"a": (2,), "b": (2,)}
    assert group.norms == {"norm": ((0,), (1,), (2,), (3,))}
    assert pruned.get_parameter("out.weight").shape == (5, 2, 3, 3)
    assert channels.consumers("a") == ("out",)


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x.add_(y),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: x - y,
        lambda x, y: x.sub(other=y),
        lambda x, y: sum([x, y]),
    ],
    ids=["add_", "torch.add", "minus", "sub", "sum"],
)
def test_every_spelling_of_a_sum_ties(pruned_equals_masked: Compare, add: Callable[[Any, Any], Any]) -> None:
    net = Net(lambda m, x: m.out(add(m.a(x), m.b(x))), a=conv(3, 4), b=conv(3, 4), out=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert layers_of(channels.groups("all")) == {"a": ("a", "b")}
    assert channels.groups() == ()


def test_in_place_addition_ties(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        y += m.b(x)
        return m.out(y.relu_())

    channels, _ = pruned_equals_masked(Net(forward, a=conv(3, 4), b=conv(3, 4), out=conv(4, 5)), IMAGE, drop={"a": [0]})
    assert layers_of(channels.groups("all")) == {"a": ("a", "b")}


def test_concatenation_keeps_layers_apart(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(m.norm(torch.cat([m.a(x), x, m.b(x)], dim=1))),
        a=conv(3, 4),
        b=conv(3, 6),
        norm=nn.BatchNorm2d(13),
        out=conv(13, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0], "b": [1, 2]})
    assert sizes_of(channels, "inner") == {"a": 4, "b": 6}
    assert channels.groups()[1].norms == {"norm": tuple((7 + i,) for i in range(6))}
    kept = [1, 2, 3, 4, 5, 6, 7, 10, 11, 12]
    assert torch.equal(pruned.get_parameter("norm.weight"), net.get_parameter("norm.weight")[kept])


def test_concatenation_in_space_ties_like_an_addition(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out(torch.cat((m.a(x), m.b(x)), 3)), a=conv(3, 4), b=conv(3, 4), out=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert layers_of(channels.groups("all")) == {"a": ("a", "b")}


def test_depthwise_convolution_goes_with_its_input(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(m.depthwise(F.relu6(m.a(x)))),
        a=conv(3, 4),
        depthwise=conv(4, 8, groups=4),
        out=conv(8, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0, 2, 3]})
    (group,) = channels.groups()
    assert group.units[1] == {"a": (1,), "depthwise": (2, 3)}
    depthwise = pruned.get_submodule("depthwise")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (1, 1, 2)
    assert channels.consumers("a") == ("depthwise",)
    assert channels.consumers("depthwise") == ("out",)


def test_grouped_convolution_goes_group_by_group(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 12, groups=3), out=conv(12, 5))
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [1]})
    (group,) = channels.groups()
    assert group.size == 3
    assert group.units[1] == {"a": (2, 3), "b": (4, 5, 6, 7)}
    assert pruned.get_parameter("b.weight").shape == (8, 2, 3, 3)


def test_grouped_convolution_of_the_image_stays_whole() -> None:
    net = Net(lambda m, x: m.out(m.a(x)), a=conv(3, 6, groups=3), out=conv(6, 5))
    channels = analyse(net, torch.randn(IMAGE))
    assert channels.groups("all") == ()
    assert channels.frozen == {"a": "a: reads channels that stay whole", "out": "network output"}


def test_squeeze_and_excitation_gate_goes_with_the_channels_it_scales(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = F.relu(m.norm(m.a(x)))
        gate = torch.sigmoid(m.expand(F.relu(m.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return m.out(gate * x)

    net = Net(
        forward,
        a=conv(3, 6),
        norm=nn.BatchNorm2d(6),
        squeeze=conv(6, 4, 1),
        expand=conv(4, 6, 1),
        out=conv(6, 5),
    )
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert layers_of(channels.groups("inner")) == {"a": ("a", "expand"), "squeeze": ("squeeze",)}
    assert channels.consumers("a") == ("squeeze", "out")
    assert channels.warnings == ()


def test_gate_through_linear_layers_and_views(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        n, c, _, _ = x.size()
        gate = m.gate(m.expand(m.squeeze(x.mean((2, 3))).relu())).view(n, c, 1, 1)
        return m.out(x * gate.expand_as(x))

    net = Net(
        forward,
        a=conv(3, 6),
        squeeze=nn.Linear(6, 4),
        expand=nn.Linear(4, 6),
        gate=nn.Hardsigmoid(),
        out=conv(6, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE)
    assert layers_of(channels.groups()) == {"a": ("a", "expand"), "squeeze": ("squeeze",)}
    assert type(pruned) is Net


def test_functional_hard_swish_is_recognised(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out((y := m.a(x)) * F.relu6(y + 3, inplace=True) / 6), a=conv(3, 6), out=conv(6, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels, "inner") == {"a": 6}


def test_shared_module_ties_what_its_calls_read(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(torch.cat([m.shared(m.a(x)), m.shared(m.b(x))], 1)),
        a=conv(3, 4),
        b=conv(3, 4),
        shared=conv(4, 6),
        out=conv(12, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [1], "shared": [0, 5]})
    assert layers_of(channels.groups()) == {"a": ("a", "b"), "shared": ("shared",)}
    assert pruned.get_parameter("out.weight").shape == (5, 8, 3, 3)


def test_tied_parameters_tie_their_layers(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(torch.cat([m.left(m.a(x)), m.right(m.b(x))], 1)),
        a=conv(3, 4),
        b=conv(3, 4),
        left=conv(4, 6, bias=False),
        right=conv(4, 6, bias=False),
        out=conv(12, 5),
    )
    net.get_submodule("right").weight = net.get_parameter("left.weight")  # type: ignore[assignment]
    channels, pruned = pruned_equals_masked(net, IMAGE)
    assert layers_of(channels.groups()) == {"a": ("a", "b"), "left": ("left", "right")}
    assert pruned.get_parameter("left.weight") is pruned.get_parameter("right.weight")
    assert pruned.get_parameter("left.weight").shape == (3, 2, 3, 3)


def test_pre_activation_stream_with_a_norm_per_block(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.stem(x)
        x = x + m.a(F.relu(m.norm_a(x)))
        x = x + m.b(F.relu(m.norm_b(x)))
        return m.out(F.relu(m.norm(x)))

    net = Net(
        forward,
        stem=conv(3, 4),
        norm_a=nn.BatchNorm2d(4),
        a=conv(4, 4),
        norm_b=nn.BatchNorm2d(4),
        b=conv(4, 4),
        norm=nn.BatchNorm2d(4),
        out=conv(4, 5),
    )
    channels, _ = pruned_equals_masked(net, IMAGE)
    (group,) = channels.groups("all")
    assert group.layers == ("stem", "a", "b")
    assert list(group.norms) == ["norm_a", "norm_b", "norm"]


def test_norm_without_scale_and_shift(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 4), norm=nn.BatchNorm2d(4, affine=False), out=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels) == {"a": 4}


class NormWithActivation(nn.BatchNorm2d):
    """A subclass as image libraries have it: the activation is part of the norm."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(super().forward(x))


@pytest.mark.parametrize(("activation", "prunable"), [(nn.SiLU(), True), (nn.Sigmoid(), False)])
def test_subclass_of_batch_norm_is_tried_out(
    pruned_equals_masked: Compare, activation: nn.Module, prunable: bool
) -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.a(x))),
        a=conv(3, 4),
        norm=NormWithActivation(4, activation),
        out=conv(4, 5),
    )
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels) == ({"a": 4} if prunable else {})


def test_prelu_with_a_slope_per_channel(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out(m.act(m.a(x))), a=conv(3, 4), act=nn.PReLU(4), out=conv(4, 5))
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [2]})
    assert channels.groups()[0].norms == {}
    assert pruned.get_parameter("act.weight").shape == (3,)


# ---- what moves channels ---------------------------------------------------------------------------------


def test_flatten_repeats_a_channel_over_its_pixels(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.hidden(m.flatten(F.max_pool2d(m.a(x), 2))))),
        a=conv(3, 4),
        flatten=nn.Flatten(),
        hidden=nn.Linear(36, 8),
        norm=nn.BatchNorm1d(8),
        out=nn.Linear(8, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [1], "hidden": [0]})
    assert [(g.name, g.kind, g.size) for g in channels.groups()] == [
        ("a", "conv", 4),
        ("hidden", "linear", 8),
    ]
    kept = [*range(9), *range(18, 36)]
    assert torch.equal(pruned.get_parameter("hidden.weight"), net.get_parameter("hidden.weight")[1:, kept])


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.view(-1, 144),
        lambda x: x.reshape((-1, 144)),
        lambda x: torch.reshape(x, shape=(2, 144)),
        lambda x: x.view(2, 4, 36).flatten(1),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.transpose(1, 3).reshape(2, -1),
        lambda x: x.unsqueeze(1).flatten(start_dim=1),
    ],
    ids=["view", "shape", "constant", "tuple", "keyword", "twice", "last", "transpose", "unsqueeze"],
)
def test_every_spelling_of_flatten(pruned_equals_masked: Compare, flatten: Callable[[Any], Any]) -> None:
    net = Net(lambda m, x: m.out(flatten(m.a(x))), a=conv(3, 4), out=nn.Linear(144, 5))
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0, 2]})
    assert sizes_of(channels, "inner") == {"a": 4}
    assert pruned.get_parameter("out.weight").shape == (5, 72)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[:, 2:5],
        lambda x: x[:, 2:-3],
        lambda x: x[:, -6:-3, :, :],
        lambda x: x[..., 2:5, :, :],
        lambda x: x.narrow(1, 2, 3),
        lambda x: torch.narrow(x, dim=-3, start=2, length=3),
        lambda x: x.split([2, 3, 3], dim=1)[1],
    ],
    ids=["slice", "negative stop", "negative", "ellipsis", "narrow", "keywords", "split"],
)
def test_slices_move_with_the_channels(pruned_equals_masked: Compare, read: Callable[[Any], Any]) -> None:
    net = Net(lambda m, x: m.out(read(y := m.a(x))) + m.all(y), a=conv(3, 8), out=conv(3, 5), all=conv(8, 5))
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0], "a#2": [1], "a#3": [2]})
    assert sizes_of(channels, "inner") == {"a": 2, "a#2": 3, "a#3": 3}, "before, inside and behind the slice"
    assert torch.equal(pruned.get_parameter("out.weight"), net.get_parameter("out.weight")[:, [0, 2]])
    assert sorted(pruned.state_dict()) == sorted(net.state_dict())


def test_slice_that_loses_all_channels_is_refused() -> None:
    net = Net(lambda m, x: m.out(m.a(x)[:, :2]), a=conv(3, 8), out=conv(2, 5))
    channels = analyse(net, torch.randn(IMAGE))
    with pytest.raises(UserError, match="a: would lose all of its 2 channels"):
        channels.plan({"a": [0, 1]})


@pytest.mark.parametrize("split", [lambda x: x.chunk(2, 1), lambda x: torch.split(x, 4, dim=1)])
def test_uneven_halves_of_a_chunk(pruned_equals_masked: Compare, split: Callable[[Any], Any]) -> None:
    def forward(m: Any, x: Any) -> Any:
        halves = split(m.a(x))
        return m.left(halves[0]) + m.right(halves[1])

    net = Net(forward, a=conv(3, 8), left=conv(4, 5), right=conv(4, 5))
    _, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0, 1], "a#2": [2]})
    assert pruned.get_parameter("left.weight").shape == (5, 2, 3, 3)
    assert pruned.get_parameter("right.weight").shape == (5, 3, 3, 3)


def test_even_halves_of_a_chunk_need_no_edit(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        halves = m.a(x).chunk(2, 1)
        return m.left(halves[0]) + m.right(halves[1])

    net = Net(forward, a=conv(3, 8), left=conv(4, 5), right=conv(4, 5))
    _, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [0], "a#2": [2]})
    assert type(pruned) is Net


class PadModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, 1, 3), 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pad(x)


@pytest.mark.parametrize("module", [True, False], ids=["module", "function"])
def test_zero_padding_adds_channels_tied_to_what_they_meet(pruned_equals_masked: Compare, module: bool) -> None:
    pad = PadModule() if module else nn.Identity()
    net = Net(
        lambda m, x: m.out((m.pad(m.a(x)) if module else F.pad(m.a(x), (0, 0, 0, 0, 1, 3))) + m.wide(x)),
        a=conv(3, 4),
        wide=conv(3, 8),
        pad=pad,
        out=conv(8, 5),
    )
    channels, pruned = pruned_equals_masked(net, IMAGE, drop={"a": [1, 2], "wide#2": [2]})
    assert channels.groups("inner") == ()
    found = {group.name: group.units for group in channels.groups("all")}
    assert found["a"] == tuple({"a": (i,), "wide": (i + 1,)} for i in range(4))
    assert found["wide"] == ({"wide": (0,)},)
    assert found["wide#2"] == tuple({"wide": (i,)} for i in (5, 6, 7))
    assert (type(pruned) is Net) == module  # a module's padding is an attribute; a function's is in the graph
    assert pruned.get_parameter("out.weight").shape == (5, 5, 3, 3)


def test_linear_layers_along_the_last_dimension(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        tokens = m.a(x).flatten(2).transpose(1, 2)
        return m.out(m.act(m.hidden(tokens)).mean(1))

    net = Net(forward, a=conv(3, 4), hidden=nn.Linear(4, 6), act=nn.GELU(), out=nn.Linear(6, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels, "inner") == {"a": 4, "hidden": 6}


def test_interpolation_pooling_and_dropout_pass(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        small = m.up(F.avg_pool2d(m.drop(y), 2))
        return m.out(torch.cat([F.interpolate(small, size=y.shape[2:]), y.detach().contiguous()], 1))

    net = Net(forward, a=conv(3, 4), drop=nn.Dropout2d(), up=nn.Upsample(scale_factor=2), out=conv(8, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels, "inner") == {"a": 4}


# ---- selections ------------------------------------------------------------------------------------------


def preactivated() -> Net:
    """Two pre-activation blocks, the first with a projection, and a head."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        x = m.skip(x) + m.b(F.relu(m.norm_b(m.a(F.relu(m.norm_a(x))))))
        x = x + m.d(F.relu(m.norm_d(m.c(F.relu(m.norm_c(x))))))
        return m.fc(F.relu(m.last(x)).mean((2, 3)))

    return Net(
        forward,
        stem=conv(3, 6),
        skip=conv(6, 8),
        norm_a=nn.BatchNorm2d(6),
        a=conv(6, 5),
        norm_b=nn.BatchNorm2d(5),
        b=conv(5, 8),
        norm_c=nn.BatchNorm2d(8),
        c=conv(8, 4),
        norm_d=nn.BatchNorm2d(4),
        d=conv(4, 8),
        last=nn.BatchNorm2d(8),
        fc=nn.Linear(8, 5),
    )


def selecting_groups(selecting: str | None) -> dict[str, int]:
    groups = analyse(preactivated(), torch.randn(IMAGE), selecting=selecting).groups("inner")  # type: ignore[arg-type]
    return {group.name: group.size for group in groups}


def test_norms_select_from_streams_that_others_read() -> None:
    selections = {"norm_a.selected": 6, "norm_c.selected": 8, "last.selected": 8}
    assert selecting_groups("norm") == {**selections, "a": 5, "c": 4}


def test_convolutions_that_start_a_branch_select_but_projections_see_all() -> None:
    assert selecting_groups("conv") == {"a.selected": 6, "c.selected": 8, "a": 5, "c": 4}


def test_nothing_selects_unless_asked() -> None:
    assert selecting_groups(None) == {"stem": 6, "a": 5, "c": 4}


def test_a_norm_that_reads_one_layer_alone_does_not_select() -> None:
    net = Net(lambda m, x: m.out(m.norm(F.max_pool2d(m.a(x), 2))), a=conv(3, 6), norm=nn.BatchNorm2d(6), out=conv(6, 5))
    groups = analyse(net, torch.randn(IMAGE), selecting="norm").groups("inner")
    assert [(group.name, group.kind) for group in groups] == [("a", "conv")]


def test_selection_leaves_its_stream_whole_and_has_channels_of_its_own(pruned_equals_masked: Compare) -> None:
    drop = {"norm_c.selected": [0, 3, 7], "last.selected": [1], "a": [2]}
    channels, pruned = pruned_equals_masked(preactivated(), IMAGE, drop=drop, selecting="norm")
    group = next(group for group in channels.groups("inner") if group.name == "norm_c.selected")
    assert (group.kind, group.layers) == ("selection", ("norm_c.selected",))
    assert group.norms == {"norm_c": tuple((i,) for i in range(8))}
    assert channels.frozen["stem"] == "norm_a: reads a selection of it"
    assert channels.inputs(group) == {"c": tuple((i,) for i in range(8))}
    assert pruned.get_buffer("norm_c.selected").tolist() == [1, 2, 4, 5, 6]
    assert pruned.get_parameter("norm_c.weight").shape == (5,)
    assert pruned.get_parameter("c.weight").shape[:2] == (4, 5)
    assert pruned.get_parameter("b.weight").shape[:2] == (8, 4)
    assert pruned.get_parameter("fc.weight").shape == (5, 7)


def test_convolution_selection_prunes_only_what_it_reads(pruned_equals_masked: Compare) -> None:
    _, pruned = pruned_equals_masked(preactivated(), IMAGE, drop={"c.selected": [0, 5], "c": [1]}, selecting="conv")
    assert pruned.get_parameter("c.weight").shape[:2] == (3, 6)
    assert pruned.get_parameter("norm_c.weight").shape == (8,)


def test_a_selecting_network_can_be_pruned_again(pruned_equals_masked: Compare) -> None:
    first = preactivated()
    pruned, _ = apply(first, analyse(first, torch.randn(IMAGE), selecting="norm").plan({"norm_c.selected": [0, 3]}))
    _, again = pruned_equals_masked(pruned, IMAGE, drop={"norm_c.selected": [0, 5]}, selecting="norm")
    assert again.get_buffer("norm_c.selected").tolist() == [2, 4, 5, 6]


def test_where_units_enter_the_layers_that_read_them() -> None:
    net = Net(
        lambda m, x: m.fc(F.avg_pool2d(m.b(m.a(x)), 3).flatten(1)), a=conv(3, 2), b=conv(2, 3), fc=nn.Linear(12, 5)
    )
    channels = analyse(net, torch.randn(IMAGE))
    a, b = channels.groups("inner")
    assert channels.inputs(a) == {"b": ((0,), (1,))}
    assert channels.inputs(b) == {"fc": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))}


# ---- what stays whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.GroupNorm(2, 4), "act: normalised by GroupNorm"),
        (nn.LayerNorm([4, 6, 6]), "act: normalised by LayerNorm"),
        (nn.InstanceNorm2d(4), "act: normalised by InstanceNorm2d"),
        (nn.Sigmoid(), "out: reads values that are not zero in a masked channel"),
        (nn.Softplus(), "out: reads values that are not zero in a masked channel"),
        (nn.Hardtanh(0.5, 1.0), "out: reads values that are not zero in a masked channel"),
        (nn.Softmax(1), "act: Softmax over the channels"),
        (nn.LocalResponseNorm(2), "act: unknown module LocalResponseNorm"),
        (nn.PixelShuffle(2), "act: unknown module PixelShuffle"),
        (nn.ChannelShuffle(2), "act: unknown module ChannelShuffle"),
        (nn.ConvTranspose2d(4, 4, 1), "act: unknown module ConvTranspose2d"),
        (nn.AlphaDropout(), "act: unknown module AlphaDropout"),
        (nn.ConstantPad2d(1, 0.5), "out: reads values that are not zero in a masked channel"),
        (nn.utils.parametrizations.weight_norm(conv(4, 4)), "act: unknown module ParametrizedConv2d"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_freeze(pruned_equals_masked: Compare, between: nn.Module, reason: str) -> None:
    shape = between(torch.randn(2, 4, 6, 6)).shape
    net = Net(lambda m, x: m.out(m.act(m.a(x))), a=conv(3, 4), act=between, out=conv(shape[1], 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert channels.groups("all") == ()
    assert channels.frozen["a"] == reason
    assert bool(channels.warnings) == ("unknown" in reason or "over" in reason)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda m, y: torch.sigmoid(y), "out: reads values that are not zero"),
        (lambda m, y: y.exp(), "out: reads values that are not zero"),
        (lambda m, y: y + 1, "out: reads values that are not zero"),
        (lambda m, y: 1 - y, "out: reads values that are not zero"),
        (lambda m, y: torch.clamp(y, min=0.1), "out: reads values that are not zero"),
        (lambda m, y: F.pad(y, (1, 1), value=2.0), "out: reads values that are not zero"),
        (lambda m, y: y + m.gain.flip(0), "add: add with a tensor that stays whole"),
        (lambda m, y: y / y.abs(), "truediv: division by a channel"),
        (lambda m, y: F.softmax(y, 1), "softmax: softmax over the channels"),
        (lambda m, y: torch.hstack([y, y])[:, :4], "hstack: unknown operation hstack"),
        (lambda m, y: torch.roll(y, 1, 1), "roll: roll of channels"),
        (lambda m, y: y.flip(1), "flip: unknown operation flip"),
        (lambda m, y: y - y.mean(1, keepdim=True), "mean: mean over the channels"),
        (lambda m, y: y * y.size(1), "mul: mul with a channel count"),
        (lambda m, y: y[:, ::2].repeat(1, 2, 1, 1), "getitem: picks channels one by one or in steps"),
        (
            lambda m, y: y.view(2, 2, 2, 6, 6).transpose(1, 2).flatten(1, 2),
            "view: lays channels along several dimensions",
        ),
        (lambda m, y: y[:, [1, 0, 3, 2]], "getitem: indexed by a tensor or a list"),
        (lambda m, y: F.conv2d(y, m.weight), "conv2d: unknown operation conv2d"),
        (lambda m, y: F.group_norm(y, 2), "group_norm: normalised by group_norm"),
        (
            lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 0), mode="reflect")[:, :, 0],
            "out: runs along another dimension",
        ),
    ],
)
def test_operations_that_freeze(
    pruned_equals_masked: Compare, operation: Callable[[Any, Any], Any], reason: str
) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 4)
            self.gain = nn.Parameter(torch.randn(4, 1, 1))
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
            self.out = nn.LazyConv2d(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(operation(self, self.a(x)))

    net = Frozen()
    net(torch.randn(IMAGE))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert channels.groups("all") == ()
    assert channels.frozen["a"].startswith(reason)


def test_value_overwritten_in_place_with_other_readers_stays_whole(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        gate = y.sigmoid_()
        return m.out(y) + m.out(gate)

    channels, _ = pruned_equals_masked(Net(forward, a=conv(3, 4), out=conv(4, 5)), IMAGE)
    assert channels.frozen["a"] == "sigmoid_: overwrites a tensor with other readers"


def test_gate_read_by_more_than_its_product_stays_whole(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        gate = torch.sigmoid(m.gate(x))
        return m.out(y * gate) + m.other(gate)

    net = Net(forward, a=conv(3, 4), gate=conv(3, 4), out=conv(4, 5), other=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert channels.groups("all") == ()
    assert channels.frozen["gate"].startswith("other: reads values that are not zero")


def test_attention_map_of_one_channel_stays_whole(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out((y := m.a(x)) * m.map(y).sigmoid()), a=conv(3, 4), map=conv(4, 1), out=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert sizes_of(channels, "inner") == {"a": 4}
    assert channels.frozen["map"] == "mul: one channel is broadcast over many"


def test_layer_whose_weight_is_read_elsewhere_stays_whole(pruned_equals_masked: Compare) -> None:
    net = Net(lambda m, x: m.out(m.b(m.a(x))) + m.a.weight.mean(), a=conv(3, 4), b=conv(4, 4), out=conv(4, 5))
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert channels.frozen["a"] == "a: its parameters are read outside of it"
    assert sizes_of(channels) == {"b": 4}


def test_parameter_shared_by_different_kinds_of_layer_stays_whole(pruned_equals_masked: Compare) -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.a(x)) + m.other(m.b(x))),
        a=conv(3, 4),
        b=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        other=nn.GroupNorm(1, 4),
        out=conv(4, 5),
    )
    net.get_submodule("other").weight = net.get_parameter("norm.weight")  # type: ignore[assignment]
    channels, _ = pruned_equals_masked(net, IMAGE)
    assert channels.groups("all") == ()


def test_network_without_plain_trace_is_refused_by_name() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"Branching: torch.fx cannot trace it.*control flow"):
        analyse(Branching(), torch.randn(IMAGE))


def test_example_of_the_wrong_shape_is_refused_by_layer() -> None:
    with pytest.raises(UserError, match=r"VGG: features.0: cannot take \(1, 1, 32, 32\)"):
        analyse(build_model("vgg11"), torch.randn(1, 1, 32, 32))


# ---- training mode ---------------------------------------------------------------------------------------


class WithAuxiliaryHead(nn.Module):
    """A head that only training mode runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 4)
        self.out = conv(4, 5)
        self.auxiliary = conv(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if self.training:
            return self.out(x) + self.auxiliary(x)
        return self.out(x)


def test_head_that_only_training_runs_is_cut_too(pruned_equals_masked: Compare) -> None:
    channels, pruned = pruned_equals_masked(WithAuxiliaryHead(), IMAGE, drop={"a": [0]})
    assert channels.consumers("a") == ("out", "auxiliary")
    assert pruned.train()(torch.randn(IMAGE, dtype=torch.float64)).shape == (2, 5, 6, 6)


def test_constant_is_edited_in_the_graphs_of_both_modes(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.out(F.dropout(m.a(x), training=m.training).view(-1, 144))

    channels, pruned = pruned_equals_masked(Net(forward, a=conv(3, 4), out=nn.Linear(144, 5)), IMAGE)
    assert [group.name for group in channels.groups()] == ["a"]
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert torch.equal(pruned.eval()(x), pruned(x))
    assert not torch.equal(pruned.train()(x), pruned(x)), "training mode drops other values each time"


def test_training_mode_that_cannot_be_traced_is_a_warning(pruned_equals_masked: Compare) -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        if m.training and x.sum() > 0:
            x = x * 2
        return m.out(x)

    channels, _ = pruned_equals_masked(Net(forward, a=conv(3, 4), out=conv(4, 5)), IMAGE)
    assert sizes_of(channels) == {"a": 4}
    assert channels.warnings[0].startswith("only evaluation mode was followed")


# ---- the analysis and the plan as such -------------------------------------------------------------------


def test_analysis_leaves_network_and_random_state_alone() -> None:
    model = build_model("resnet20")
    model.train()
    model.layer1.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    channels = analyse(model, torch.randn(1, 3, 32, 32, generator=torch.Generator()))
    apply(model, channels.plan({"layer1.0.conv1": [0]}))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_optional_arguments_keep_their_defaults(pruned_equals_masked: Compare) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = conv(3, 4), conv(4, 5)

        def forward(self, x: torch.Tensor, scale: float = 2.0, mask: torch.Tensor | None = None) -> torch.Tensor:
            x = self.a(x) * scale
            return self.out(x if mask is None else x * mask)

    channels, _ = pruned_equals_masked(Optional(), IMAGE)
    assert sizes_of(channels) == {"a": 4}


def test_plan_says_what_each_module_keeps() -> None:
    channels = analyse(build_model("vgg11"), torch.randn(1, 3, 32, 32))
    plan = channels.plan({"features.0": range(1, 64), "features.4": []})
    assert plan.outputs == {"features.0": (0,), "features.1": (0,)}
    assert plan.inputs == {"features.4": (0,)}
    assert plan.attributes == {
        "features.0": {"out_channels": 1},
        "features.1": {"num_features": 1},
        "features.4": {"in_channels": 1},
    }
    assert plan.edits == {}


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"features.0": range(64)}, "features.0: would lose all of its 64 channels"),
        ({"features.0": [64]}, "features.0: units to drop must be between 0 and 63"),
        ({"features.0": [-1]}, "features.0: units to drop must be between 0 and 63"),
        ({"classifier.3": [0]}, r"classifier.3: stays whole \(network output\)"),
        ({"stem": [0]}, "stem: no group of this network"),
    ],
)
def test_impossible_plans_are_refused(drop: dict[str, Any], message: str) -> None:
    channels = analyse(build_model("vgg11"), torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match=message):
        channels.plan(drop)


def test_unknown_scope_is_refused() -> None:
    channels = analyse(build_model("vgg11"), torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match=r"scope=outer: must be inner or all"):
        channels.groups("outer")
