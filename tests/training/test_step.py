"""Recorded and compiled steps train as plain ones do, and give way to them where they cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from harness import FakeRecorder
from rethink_prune.errors import UserError
from rethink_prune.models import build_model
from rethink_prune.pruning.factors import ScalingFactors
from rethink_prune.pruning.slimming import ScalePenalty
from rethink_prune.training.hooks import HeldMasks, TrainingHooks
from rethink_prune.training.recording import WARM_UP
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer
from rethink_prune.training.step import PlainStep, Step, build_step, record_step

CPU = torch.device("cpu")
SPEC = OptimizerSpec("sgd", 0.05, 0.9, False, 1e-4, "constant", 1, (), ())
NO_HOOKS = TrainingHooks()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def batches(count: int, *, last: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of 16 images, and a smaller one after every sixth."""
    generator = torch.Generator().manual_seed(1)
    sizes = [last if i % 7 == 6 else 16 for i in range(count)]
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4) for n in sizes]


def masked() -> HeldMasks:
    return HeldMasks({"0.weight": torch.arange(8 * 27).view(8, 3, 3, 3) % 3 > 0})


def factors() -> ScalingFactors:
    return ScalingFactors({"1": [(channel,) for channel in range(8)]}, strength=0.5, momentum=0.9)


HOOKS: list[Callable[[], TrainingHooks]] = [
    TrainingHooks,
    masked,
    factors,
    lambda: ScalePenalty(0.01, ["1"]),
]


class Trained:
    """A network trained by a step of the given kind; keeps the losses."""

    def __init__(
        self,
        make: Callable[[nn.Module, torch.optim.Optimizer, TrainingHooks], Step],
        hooks: TrainingHooks,
        *,
        count: int = 30,
        optimizer: str = "sgd",
        device: torch.device = CPU,
        mixed: bool = False,
    ) -> None:
        self.model = network().to(device)
        hooks.prepare(self.model)
        spec = OptimizerSpec(optimizer, 0.05, 0.9, False, 1e-4, "constant", 1, (), ())
        self.optimizer = build_optimizer(hooks.optimized(self.model), spec, fused=device.type == "cuda")
        step = make(self.model, self.optimizer, hooks)
        self.losses = []
        for index, (images, labels) in enumerate(batches(count)):
            if index in (10, 20):
                self.optimizer.param_groups[0]["lr"] *= 0.1
                hooks.after_epoch(self.model)
            if mixed:
                labels = 0.125 + 0.5 * nn.functional.one_hot(labels, 4).float()  # shares of classes
            self.losses.append(float(step(images.to(device), labels.to(device))[0]))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: TrainingHooks) -> Step:
    device = next(model.parameters()).device
    return build_step(model, optimizer, hooks, runtime=Runtime(device, "fp32", "off"))


def recorded(recorder: FakeRecorder) -> Callable[[nn.Module, torch.optim.Optimizer, TrainingHooks], Step]:
    return lambda model, optimizer, hooks: record_step(plain(model, optimizer, hooks), model, optimizer, recorder)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in states)


@pytest.mark.parametrize("hooks", HOOKS)
def test_replays_warm_ups_and_partial_batches_add_up_to_plain_training(hooks: Callable[[], TrainingHooks]) -> None:
    recorder = FakeRecorder()
    expected, found = Trained(plain, hooks()), Trained(recorded(recorder), hooks())
    assert found.losses == expected.losses
    assert same_bits(found.model, expected.model)
    assert all(parameter.grad is None for parameter in found.model.parameters())
    assert recorder.warmed == WARM_UP
    assert recorder.replayed == 30 - WARM_UP - 4, "four batches of 30 are partial"
    assert recorder.recorded == 1, "learning rates are read from the device"


def test_steps_on_mixed_images_are_replayed() -> None:
    recorder = FakeRecorder()
    expected, found = Trained(plain, NO_HOOKS, mixed=True), Trained(recorded(recorder), NO_HOOKS, mixed=True)
    assert found.losses == expected.losses != Trained(plain, NO_HOOKS).losses
    assert same_bits(found.model, expected.model)
    assert recorder.replayed == 30 - WARM_UP - 4


def test_plain_steps_read_the_learning_rate_where_replayed_ones_do() -> None:
    class Noticing(TrainingHooks):
        replayable = True

        def before_step(self, model: nn.Module, lr: float) -> None:
            seen.append(lr)

    seen: list[Any] = []
    Trained(recorded(FakeRecorder()), Noticing(), count=8)
    assert len({id(lr) for lr in seen}) == 1, (
        "the same tensor: a resumed training, whose first steps are plain, rounds alike"
    )
    assert isinstance(seen[0], torch.Tensor)


def test_a_partial_batch_that_comes_first_is_not_what_is_recorded() -> None:
    recorder = FakeRecorder()
    model = network()
    optimizer = build_optimizer(model.parameters(), SPEC, fused=False)
    step = recorded(recorder)(model, optimizer, NO_HOOKS)
    few, many = torch.randn(5, 3, 8, 8), torch.randn(16, 3, 8, 8)
    for images in (few, *[many] * (WARM_UP + 2), few, many):
        step(images, torch.zeros(len(images), dtype=torch.long))
    assert (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (FakeRecorder(fails="\noperation not permitted\nwhen stream is capturing"), "operation not permitted"),
        (FakeRecorder(random=True), "the network draws random numbers"),
    ],
)
def test_what_cannot_be_recorded_goes_on_plainly_and_says_why_once(
    recorder: FakeRecorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, found = Trained(plain, TrainingHooks()), Trained(recorded(recorder), TrainingHooks())
    assert found.losses == expected.losses
    assert [record.getMessage() for record in caplog.records] == [
        f"accelerate: no CUDA graph of training steps, because {reason}; kernels are launched one by one"
    ]


def test_only_hooks_that_say_so_are_replayed(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(TrainingHooks):
        def after_step(self, model: nn.Module, lr: float) -> None:
            self.steps = getattr(self, "steps", 0) + 1

    class Zeroing(TrainingHooks):
        def after_epoch(self, model: nn.Module) -> None:
            pass

    assert not Counting().replayable
    assert Zeroing().replayable, "nothing of it runs inside a step"
    assert all(make().replayable for make in HOOKS)
    model = network()
    optimizer = build_optimizer(model.parameters(), SPEC, fused=False)
    # Decided before anything of CUDA is touched.
    device = torch.device("cuda")
    step = build_step(model, optimizer, Counting(), runtime=Runtime(device, "fp32"))
    assert type(step) is PlainStep
    assert "because Counting does not say that its steps can be replayed" in caplog.text


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_that_deterministic_refuses_is_named_in_one_line() -> None:
    class Putting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.fc(x.flatten(1))
            return logits.put(torch.tensor([0]), torch.zeros(1))

    model = Putting()
    optimizer = build_optimizer(model.parameters(), SPEC, fused=False)
    step = plain(model, optimizer, NO_HOOKS)
    images, labels = batches(1)[0]
    with deterministic(), pytest.raises(UserError, match=r"^deterministic=true: put\S* has no deterministic") as error:
        step(images, labels)
    assert "\n" not in str(error.value)


def test_what_fails_compiled_is_done_plainly_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nand more")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    expected, found = Trained(plain, TrainingHooks(), count=4), Trained(compiled, TrainingHooks(), count=4)
    assert found.losses == expected.losses
    assert same_bits(found.model, expected.model)
    assert [record.getMessage() for record in caplog.records] == [
        "accelerate: torch.compile failed: no C++ compiler; going on without it"
    ]


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: TrainingHooks) -> Step:
    device = next(model.parameters()).device
    return build_step(model, optimizer, hooks, runtime=Runtime(device, "fp32"), compiles=True)


@pytest.mark.parametrize("hooks", [masked, factors])
def test_compiled_steps_train_as_plain_ones_to_one_in_a_thousand(
    hooks: Callable[[], TrainingHooks], caplog: pytest.LogCaptureFixture
) -> None:
    Trained(compiled, TrainingHooks(), count=1)  # code that a network with hooks must not be given
    expected, found = Trained(plain, hooks(), count=8), Trained(compiled, hooks(), count=8)
    if "torch.compile failed" in caplog.text:
        pytest.skip(caplog.text)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)


def test_channels_last_trains_as_the_plain_format_to_one_in_a_thousand() -> None:
    def losses(memory_format: torch.memory_format) -> list[float]:
        torch.manual_seed(0)
        model = build_model("resnet20").to(memory_format=memory_format)
        optimizer = build_optimizer(model.parameters(), SPEC, fused=False)
        step = plain(model, optimizer, NO_HOOKS)
        return [float(step(images, labels)[0]) for images, labels in batches(6)]

    assert losses(torch.channels_last) == pytest.approx(losses(torch.contiguous_format), rel=1e-3)


def accelerated(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: TrainingHooks) -> Step:
    device = next(model.parameters()).device
    return build_step(model, optimizer, hooks, runtime=Runtime(device, "fp32"))


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_cuda_graphs_train_as_plain_steps_to_one_in_a_thousand(
    hooks: Callable[[], TrainingHooks], optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    expected = Trained(plain, hooks(), optimizer=optimizer, device=device)
    found = Trained(accelerated, hooks(), optimizer=optimizer, device=device)
    assert not caplog.records, "nothing fell back"
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    for (name, a), b in zip(expected.model.state_dict().items(), found.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.cuda
def test_a_network_with_dropout_is_not_recorded_on_cuda(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    model = nn.Sequential(nn.Dropout(0.5), network()).to(device)
    optimizer = build_optimizer(model.parameters(), SPEC, fused=True)
    step = accelerated(model, optimizer, NO_HOOKS)
    with caplog.at_level(logging.WARNING):
        for images, labels in batches(6):
            step(images.to(device), labels.to(device))
    assert "the network draws random numbers" in caplog.text
