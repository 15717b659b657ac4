"""Networks of odd construction: pruned exactly as masked, with what stays whole; or refused before training."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from harness import mask, randomise
from rethink_prune import load_model
from rethink_prune.cost import count_cost
from rethink_prune.errors import UserError
from rethink_prune.export import main as export
from rethink_prune.outputs import main_output
from rethink_prune.surgery.branches import remove_branches
from rethink_prune.surgery.channels import Channels, analyse
from rethink_prune.surgery.cut import apply, reshape

Study = Callable[..., dict[str, Any]]


class Plain(nn.Module):
    """Two convolutions and a head; others add to it."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner: Any = nn.Conv2d(8, 12, 3, padding=1)
        self.head: Any = nn.Linear(12, num_classes)
        self.finish()

    def finish(self) -> None: ...

    def low(self, x: Any) -> Any:
        return torch.relu(self.norm(self.stem(x)))

    def features(self, x: Any) -> Any:
        return torch.relu(self.inner(self.low(x)))

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x).mean((2, 3)))


def changed(finish: Callable[[Any], Any] | None = None, forward: Callable[[Any, Any], Any] | None = None) -> Any:
    """Return a network that differs from the plain one in what its constructor adds, or in its forward pass."""
    own = {"finish": finish, "forward": forward and (lambda self, x: forward(self, x))}
    return type("Changed", (Plain,), {name: value for name, value in own.items() if value})


def add(**modules: Callable[[], Any]) -> Callable[[Any], None]:
    def finish(model: Any) -> None:
        for name, make in modules.items():
            setattr(model, name, make())

    return finish


def pooled(m: Any, f: Any) -> Any:
    return m.head(f.mean((2, 3)))


def point(inputs: int = 12, outputs: int = 12, **options: Any) -> Any:
    return nn.Conv2d(inputs, outputs, options.pop("size", 1), **options)


class Keyword(Plain):
    def forward(self, x: Any, *, scale: float = 2.0, mask: Any = None, both: bool = False, **ignored: Any) -> Any:
        features = self.features(x) * scale
        return (pooled(self, features), features) if both or mask is not None else pooled(self, features)


class DictBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = point()

    def forward(self, parts: dict[str, Any]) -> dict[str, Any]:
        return {**parts, "new": self.conv(parts["old"])}


class Reversed(nn.Sequential):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(len(self) - 1 - index)

    def forward(self, x: Any) -> Any:
        for index in range(len(self)):
            x = self[index](x)
        return x


def blocks(m: Any, x: Any) -> Any:
    parts = m.block({"old": m.features(x)})
    return pooled(m, parts["old"] + parts["new"])


def recurrent(m: Any, x: Any) -> Any:
    rows = m.features(x).flatten(2)
    state = torch.tanh(m.read(rows[:, :, 0]))
    for index in range(1, 4):
        state = torch.tanh(m.read(rows[:, :, index]) + m.keep(state))
    return m.head(state)


def shuffled(m: Any, x: Any) -> Any:
    f = m.grouped(m.features(x))
    n, c, h, w = f.shape
    return pooled(m, m.last(f.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)))


def share_weight(m: Any) -> None:
    m.first, m.second = point(size=3, padding=1), point(size=3, padding=1)
    m.second.weight = m.first.weight


def frozen_stem(m: Any) -> None:
    for parameter in m.stem.parameters():
        parameter.requires_grad = False
    m.norm.eval()


def in_training(m: Any, x: Any) -> Any:
    logits = Plain.forward(m, x)
    return (logits, m.aux(m.low(x).mean((2, 3)))) if m.training else logits


def overwritten(m: Any, x: Any) -> Any:
    f = m.low(x)
    f[:, :3].add_(1.0)
    return pooled(m, torch.relu(m.inner(f)))


def unpooled(m: Any, x: Any) -> Any:
    f, indexes = m.pool(m.features(x))
    return pooled(m, m.back(f, indexes))


def filtered(m: Any, x: Any) -> Any:
    f = m.features(x)
    return pooled(m, f + torch.fft.irfft2(torch.fft.rfft2(f, norm="ortho"), s=f.shape[-2:], norm="ortho"))


# By name: the network, and what stays whole beside the head.
EXACT: dict[str, tuple[Any, set[str]]] = {
    "LSTM over rows": (
        changed(
            add(rnn=lambda: nn.LSTM(96, 12, batch_first=True)),
            lambda m, x: m.head(m.rnn(m.features(x).permute(0, 2, 1, 3).flatten(2))[0][:, -1]),
        ),
        {"inner"},
    ),
    "own recurrent cell in a loop": (
        changed(add(read=lambda: nn.Linear(12, 12), keep=lambda: nn.Linear(12, 12, bias=False)), recurrent),
        set(),
    ),
    "blocks that pass dictionaries": (changed(add(block=DictBlock), blocks), set()),
    "OrderedDict of outputs": (
        changed(None, lambda m, x: OrderedDict(low=m.low(x), out=Plain.forward(m, x))),
        {"stem"},
    ),
    "keyword-only arguments, **kwargs": (Keyword, set()),
    "FFT": (changed(None, filtered), {"inner"}),
    "quantisation stubs": (
        changed(
            add(q=torch.ao.quantization.QuantStub, d=torch.ao.quantization.DeQuantStub),
            lambda m, x: m.d(Plain.forward(m, m.q(x))),
        ),
        set(),
    ),
    "spectral_norm": (changed(lambda m: parametrizations.spectral_norm(m.inner)), {"stem", "inner"}),
    "weight_norm on the first layer": (changed(lambda m: parametrizations.weight_norm(m.stem)), {"stem"}),
    "orthogonal": (changed(lambda m: parametrizations.orthogonal(m.head)), {"inner"}),
    "backward hook": (changed(lambda m: m.inner.register_full_backward_hook(lambda *_: None)), {"stem", "inner"}),
    "convolution used twice": (
        changed(add(twice=point), lambda m, x: pooled(m, m.twice(torch.relu(m.twice(m.features(x)))))),
        set(),
    ),
    "parameter of two layers": (
        changed(share_weight, lambda m, x: pooled(m, m.second(torch.relu(m.first(m.features(x)))))),
        set(),
    ),
    "transposed tie": (
        changed(
            add(encode=lambda: nn.Linear(12, 6)),
            lambda m, x: m.head(F.linear(m.encode(m.features(x).mean((2, 3))), m.encode.weight.t())),
        ),
        {"inner", "encode"},
    ),
    "Sequential with its own __getitem__": (
        changed(
            add(part=lambda: Reversed(point(6, 12), nn.ReLU(), point(12, 6))),
            lambda m, x: pooled(m, m.part(m.features(x))),
        ),
        set(),
    ),
    "padding modes": (
        changed(
            add(
                ring=lambda: point(size=3, padding=1, padding_mode="circular", bias=False),
                deep=lambda: point(size=3, padding=1, padding_mode="reflect", groups=12),
            ),
            lambda m, x: pooled(m, m.deep(torch.relu(m.ring(m.features(x))))),
        ),
        set(),
    ),
    "ConvTranspose2d": (
        changed(
            add(up=lambda: nn.ConvTranspose2d(12, 6, 2, 2), down=lambda: point(6)),
            lambda m, x: pooled(m, m.down(m.up(m.features(x)))),
        ),
        {"inner"},
    ),
    "position parameter": (
        changed(
            add(place=lambda: nn.Parameter(torch.randn(1, 12, 1, 1)), last=point),
            lambda m, x: pooled(m, m.last(m.features(x) + m.place)),
        ),
        set(),
    ),
    "checkpointed block": (
        changed(add(part=point), lambda m, x: pooled(m, checkpoint(m.part, m.features(x), use_reentrant=False))),
        set(),
    ),
    "functional batch norm": (
        changed(
            None,
            lambda m, x: pooled(m, F.batch_norm(m.inner(m.low(x)), None, None, training=True)),
        ),
        {"inner"},
    ),
    "einsum": (
        changed(None, lambda m, x: m.head(torch.einsum("nchw,nc->nc", m.features(x), m.features(x).mean((2, 3))))),
        set(),
    ),
    "frozen layer": (changed(frozen_stem), set()),
    "auxiliary head in training": (changed(add(aux=lambda: nn.Linear(8, 10)), in_training), {"aux"}),
    "MaxUnpool2d": (
        changed(
            add(pool=lambda: nn.MaxPool2d(2, return_indices=True), back=lambda: nn.MaxUnpool2d(2)),
            unpooled,
        ),
        {"inner"},
    ),
    "PixelShuffle": (
        changed(
            add(up=lambda: nn.PixelShuffle(2), last=lambda: point(3)),
            lambda m, x: pooled(m, m.last(m.up(m.features(x)))),
        ),
        {"inner"},
    ),
    "channel shuffle": (
        changed(add(grouped=lambda: point(groups=3), last=point), shuffled),
        {"inner", "grouped"},
    ),
    "view with a channel number": (
        changed(
            add(head=lambda: nn.Linear(12 * 64, 10)), lambda m, x: m.head(m.features(x).contiguous().view(-1, 768))
        ),
        set(),
    ),
    "arithmetic with x.size(1)": (
        changed(None, lambda m, x: pooled(m, m.features(x) / m.features(x).size(1) ** 0.5)),
        {"inner"},
    ),
    "overwritten slice": (changed(None, overwritten), set()),
    "double precision": (
        changed(lambda m: m.double(), lambda m, x: Plain.forward(m, x.double())),
        set(),
    ),
}


def dropped(channels: Channels, scope: str) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.randperm(g.size, generator=generator)[: g.size // 2].tolist() for g in channels.groups(scope)}


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_pruned_as_masked(name: str) -> None:
    factory, whole = EXACT[name]
    torch.manual_seed(0)
    model, x = randomise(factory()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    channels = analyse(model, x)
    assert set(channels.frozen) == whole | {"head"}
    for scope in ("inner", "all"):
        drop = dropped(channels, scope)
        masked, (pruned, architecture) = mask(model, channels, drop), apply(model, channels.plan(drop))
        again = reshape(model, architecture)
        again.load_state_dict(pruned.state_dict())
        for training in (False, True):
            expected = main_output(masked.train(training)(x))
            for network in (pruned, again):
                assert (main_output(network.train(training)(x)) - expected).abs().max() < 1e-9


# Forward passes that do what no trace records, and slices that could be cut unevenly if a trace were all there is.
def slices(m: Any, f: Any) -> Any:
    return pooled(m, torch.cat([m.left(f[:, :5]), m.right(f[:, 5:])], 1))


def without_gradients(m: Any, x: Any) -> Any:
    with torch.no_grad():
        f = m.low(x)
    return slices(m, m.inner(f))


def in_bfloat16(m: Any, x: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = m.features(x)
    return slices(m, f.to(x.dtype))


def sets_attribute(m: Any, x: Any) -> Any:
    m.seen = m.features(x)
    return slices(m, m.seen)


UNRECORDED = {
    "gradients": without_gradients,
    "another precision": in_bfloat16,
    "draws random": lambda m, x: slices(m, m.features(x)) * (1 + random.random()),
    "draws random numbers": lambda m, x: slices(m, m.features(x) + torch.rand(1)),
    "sets attributes": sets_attribute,
}


@pytest.mark.parametrize("reason", UNRECORDED)
def test_no_trace_replaces_a_forward_pass_that_does_more(reason: str) -> None:
    parts = add(left=lambda: point(5, 6), right=lambda: point(7, 6))

    def finish(m: Any) -> None:
        parts(m)
        m.seen = None
        m.register_buffer("mean", torch.ones(3))

    model, x = changed(finish, UNRECORDED[reason])(), torch.randn(2, 3, 8, 8)
    channels = analyse(model, x)
    assert reason in channels.frozen["inner"]
    pruned, architecture = apply(model, channels.plan(dropped(channels, "all")))
    assert not architecture.edits
    pruned(x)
    assert analyse(changed(parts, lambda m, x: slices(m, m.features(x)))(), x).frozen.keys() == {"head"}


def test_no_branch_is_removed_by_a_trace_that_is_not_all() -> None:
    def forward(m: Any, x: Any) -> Any:
        with torch.no_grad():
            f = m.low(x)
        f = m.inner(f)
        return pooled(m, f + m.branch(f))

    with pytest.raises(UserError, match="no block can be removed: its forward pass runs parts without gradients"):
        remove_branches(changed(add(branch=point), forward)(), ["branch"])


def test_what_runs_by_chance_is_cut_too() -> None:
    model, x = BySkipping(), torch.randn(2, 3, 8, 8)
    channels = analyse(model, x)
    assert {"inner", "block.0", "block.1"} <= {name for group in channels.groups("all") for name in group.layers}
    pruned, _ = apply(model, channels.plan(dropped(channels, "all")))
    random.seed(0)
    for _ in range(20):
        pruned(x)


def test_tensors_that_a_forward_pass_makes_on_the_cpu_do_not_hinder_counting() -> None:
    makes = changed(None, lambda m, x: Plain.forward(m, x) * torch.arange(10))
    assert count_cost(makes(), (3, 8, 8)) == count_cost(Plain(), (3, 8, 8))


# Whole studies.
class BySkipping(Plain):
    """Draws which of its blocks it runs, in evaluation mode as well."""

    def finish(self) -> None:
        self.block = nn.ModuleList(point() for _ in range(2))

    def forward(self, x: Any) -> Any:
        f = self.features(x)
        for block in self.block:
            f = f + F.dropout(block(f), 0.2) if random.random() < 0.7 else f
        return pooled(self, f)


class CountsInBuffer(Plain):
    def finish(self) -> None:
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        if self.training:
            self.steps += 1
        return super().forward(x) / (1 + torch.exp(-self.steps))


class Mixed(Plain):
    def finish(self) -> None:
        self.head.double()

    def forward(self, x: Any) -> Any:
        features = self.features(x)
        return {"all": features.detach().amax((1, 2, 3)), "logits": self.head(features.mean((2, 3)).double())}


@pytest.mark.parametrize("network", [BySkipping, CountsInBuffer, Mixed], ids=lambda network: network.__name__)
def test_studied_twice_with_the_same_bits_and_evaluated_elsewhere(
    network: type[Plain], small_study: Study, tmp_path: Path
) -> None:
    name = f"{__name__}:{network.__name__}"
    options = f"model.name={name}", "arms=[finetune,scratch_e]", "recipe.epochs=1"
    runs = [small_study(*options, f"store.root={tmp_path / root}") for root in ("one", "two")]
    for arm in ("finetune", "scratch_e"):
        first, second = (Path(run["arms"][arm]["stage"]) for run in runs)
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        assert load_file(first / "model.safetensors")
        load_model(first, factory=network)
        found = tmp_path / f"{arm}.json"
        images = ["dataset=digits", "dataset.image_size=8", "dataset.train_limit=200", "dataset.test_limit=100"]
        arguments = [str(first), "--factory", name, "--device", "cpu", "--precision", "fp32", "--json", str(found)]
        assert export([*arguments, "--evaluate", *images]) == 0
        assert f'"top1": {runs[0]["arms"][arm]["top1"]}' in found.read_text()


def remembers(key: str, make: Callable[[], Any], use: Callable[[Any], Any]) -> Any:
    def forward(m: Any, x: Any) -> Any:
        y = Plain.forward(m, x)
        return y + 0 * use(m) if m.training else y

    return changed(lambda m: setattr(m, key, make()), forward)


def count(m: Any) -> float:
    m.calls["all"] = m.calls.get("all", 0) + 1
    return 1.0


def remember(m: Any) -> float:
    m.history.append(len(m.history))
    return 1.0


def watches(m: Any, x: Any) -> Any:
    m.largest.copy_(torch.maximum(m.largest, x.detach().amax() + 1))
    return Plain.forward(m, x)


def caches(m: Any, x: Any) -> Any:
    if m.cache is None:
        m.cache = torch.linspace(1, 2, 12).view(1, 12, 1, 1).to(x)
    return pooled(m, m.features(x) * m.cache)


def registers(m: Any, x: Any) -> Any:
    if "cache" not in dict(m.named_buffers()):
        m.register_buffer("cache", torch.ones(1))
    return Plain.forward(m, x)


def share_memory(m: Any) -> None:
    m.more = nn.Linear(12, 12)
    m.inner.bias = nn.Parameter(m.more.bias.data[:])


def wrapped(wrap: Callable[[nn.Module], Any]) -> Any:
    return lambda num_classes: wrap(Plain(num_classes))


class Varied(Plain):
    def forward(self, *images: Any) -> Any:
        return super().forward(*images)


REFUSED: dict[str, Any] = {
    "changes calls in every step, in no buffer": remembers("calls", dict, count),
    "changes history in every step, in no buffer": remembers("history", lambda: deque(maxlen=8), remember),
    "changes draws in every step, in no buffer": remembers(
        "draws", lambda: random.Random(0), lambda m: m.draws.random()
    ),
    "changes own in every step, in no buffer": remembers(
        "own", lambda: torch.Generator().manual_seed(0), lambda m: torch.rand(1, generator=m.own)
    ),
    "in evaluation mode, changes largest": changed(lambda m: m.register_buffer("largest", torch.zeros(())), watches),
    "runs other operations once it has run": changed(lambda m: setattr(m, "cache", None), caches),
    "has cache only before or after it has run": changed(None, registers),
    "inner.bias and more.bias: use the same memory": changed(share_memory),
    "norm.weight: has a hook on its gradient": changed(lambda m: m.norm.weight.register_hook(lambda g: g / 2)),
    "cannot be trained: add(sparse, dense) is not supported": changed(
        add(table=lambda: nn.Embedding(3, 12, sparse=True)),
        lambda m, x: m.head(m.features(x).mean((2, 3)) * m.table(torch.zeros(1, dtype=torch.long, device=x.device))),
    ),
    "inner.weight has no shape yet": changed(lambda m: setattr(m, "inner", nn.LazyConv2d(12, 3))),
    "gave a DataParallel around a network": wrapped(nn.DataParallel),
    "gave a OptimizedModule around a network": wrapped(lambda model: torch.compile(model, backend="eager")),
    "gave a TopLevelTracedModule around a network": wrapped(
        lambda model: torch.jit.trace(model.eval(), torch.zeros(1, 3, 8, 8))
    ),
    "torch.fx cannot trace it": Varied,
    "mul depends on the width of a layer": changed(
        None, lambda m, x: pooled(m, m.features(x) * m.inner.out_channels**-0.5)
    ),
    "cannot be copied": changed(lambda m: setattr(type(m), "__deepcopy__", lambda self, memo: 1 / 0)),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_before_training(
    message: str, small_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules[__name__], "chosen", lambda num_classes: REFUSED[message](num_classes), raising=False
    )
    with pytest.raises(UserError) as error:
        small_study(f"model.name={__name__}:chosen", "arms=[finetune]")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("store/stages/*")), "nothing was trained"
