"""The training loop: resuming changes nothing, divergence is noticed, schedules are PyTorch's."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from rethink_prune import build_model
from rethink_prune.data import EvalBatches, ImageArray, TrainBatches
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.mixing import Mixing
from rethink_prune.data.normalization import Normalization
from rethink_prune.errors import Interrupted
from rethink_prune.pruning.factors import ScalingFactors
from rethink_prune.study.keys import optimizer_key
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.evaluate import evaluate
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress, Row
from rethink_prune.training.runtime import Runtime, Speed
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer, build_scheduler
from rethink_prune.training.step import build_step
from rethink_prune.training.train import Diverged, train

CPU = torch.device("cpu")
NORMALIZE = Normalization((0.5,) * 3, (0.25,) * 3, image_size=8, device=CPU)


NO_HOOKS = TrainingHooks()


def spec(**changes: object) -> OptimizerSpec:
    values: dict[str, object] = {
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "schedule": "multistep",
        "epochs": 3,
        "milestones": (1, 2),
        "gammas": (0.1, 0.1),
    }
    return OptimizerSpec(**{**values, **changes})  # type: ignore[arg-type]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def transformer() -> nn.Module:
    """Draws numbers as well: stochastic depth."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "dim": 16, "depth": 3, "heads": 2}
    return build_model("vit_tiny", drop_path=0.5, num_classes=4, **sizes)


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, init_values=1e-4)


def timm_swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=4)


def images() -> ImageArray:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (50, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ImageArray(pixels, torch.arange(50) % 4)


def run(
    model: nn.Module,
    folder: Path,
    *,
    interrupts: Interrupts | None = None,
    seconds: float = 1e9,
    hooks: TrainingHooks = NO_HOOKS,
    deterministic: bool = False,
    mixing: Mixing | None = None,
    rand_augment: int = 0,
    **changes: object,
) -> Progress:
    train_images = DeviceImages(images(), NORMALIZE, pad=1, flip=True, seed=0, rand_augment=rand_augment)
    return train(
        model,
        TrainBatches(train_images, batch_size=16, mixing=mixing),
        {"test": EvalBatches(DeviceImages(images(), NORMALIZE), batch_size=32)},
        spec(**changes),
        runtime=Runtime(CPU, "fp32", deterministic=deterministic, checkpoint_seconds=seconds),
        hooks=hooks,
        seed=0,
        checkpoints=Checkpoints(folder),
        interrupts=interrupts or Interrupts(),
        title="arm",
    )


def untimed(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


class StopAfter(Interrupts):
    """Asks to stop after so many looks at the signal: one per step."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        super().__init__()

    @property
    def requested(self) -> int | None:  # type: ignore[override]
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None

    @requested.setter
    def requested(self, value: int | None) -> None:
        pass


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("build", "steps"), [(network, 0), (network, 2), (network, 3), (network, 5), (transformer, 2), (transformer, 5)]
)
def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(
    build: Callable[[], nn.Module], steps: int, mixed: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"mixing": Mixing(0.8, 1.0, 4, seed=0), "rand_augment": 9} if mixed else {}
    straight, resumed = build(), build()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = run(straight, tmp_path / "a", **options)
    with pytest.raises(Interrupted, match=r"SIGTERM in arm, epoch \d of 3: saved; run the same command again"):
        run(build(), tmp_path / "b", interrupts=StopAfter(steps), **options)
    progress = run(resumed, tmp_path / "b", **options)
    assert untimed(progress.rows) == untimed(expected.rows)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, resumed = network(), network()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(straight, tmp_path / "a")
    with pytest.raises(Interrupted):
        run(network(), tmp_path / "b", interrupts=StopAfter(5), seconds=0)
    _, newest = Checkpoints(tmp_path / "b").files()
    newest.write_bytes(newest.read_bytes()[:100])
    run(resumed, tmp_path / "b")
    assert f"{newest} is damaged" in caplog.text
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(4):
        checkpoints.save({"step": step}, epoch=0, step=step)
    assert len(checkpoints.files()) == 2
    assert checkpoints.latest() == {"step": 3}
    checkpoints.clear()
    assert checkpoints.latest() is None


def test_a_checkpoint_cannot_execute_code(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"code": print}, epoch=0, step=0)
    with pytest.raises(Exception, match=r"weights_only|[Uu]nsupported"):
        checkpoints.latest()


def test_a_loss_that_is_not_finite_stops_with_epoch_and_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the training loss became nan in epoch 1 at learning rate 1e\+30"):
        run(network(), tmp_path, lr=1e30)


def test_rows_say_what_happened(tmp_path: Path) -> None:
    model = network()
    rows = run(model, tmp_path).rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.005, 0.0005])
    assert all(row["images"] == 50 for row in rows)
    result = evaluate(model, EvalBatches(DeviceImages(images(), NORMALIZE), batch_size=7), runtime=Runtime(CPU, "fp32"))
    assert result.loss == pytest.approx(rows[-1]["test_loss"], rel=1e-5)
    assert result.top1 == rows[-1]["test_top1"]


def test_the_loop_equals_the_plain_textbook_loop(tmp_path: Path) -> None:
    """Without dropout: the same batches through SGD written out by hand."""
    model, plain = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
    )
    plain.load_state_dict(model.state_dict())
    run(model, tmp_path)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    batches = TrainBatches(DeviceImages(images(), NORMALIZE, pad=1, flip=True, seed=0), batch_size=16)
    for epoch in range(3):
        for x, y in batches.epoch(epoch):
            plain.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            with torch.no_grad():
                for p, v in zip(plain.parameters(), velocity, strict=True):
                    assert p.grad is not None
                    v.mul_(0.9).add_(p.grad + 1e-4 * p)
                    p.sub_(0.05 * 0.1**epoch * v)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_hooks_act_where_they_say(tmp_path: Path) -> None:
    class Recording(TrainingHooks):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def before_step(self, model: nn.Module, lr: float) -> None:
            assert all(p.grad is not None for p in model.parameters())
            self.calls.append(f"before {lr:g}")

        def after_step(self, model: nn.Module, lr: float) -> None:
            assert all(p.grad is not None for p in model.parameters())
            self.calls.append(f"after {lr:g}")

        def after_epoch(self, model: nn.Module) -> None:
            with torch.no_grad():
                model.get_parameter("5.weight").zero_()
                model.get_parameter("5.bias").copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
            self.calls.append("epoch")

    hooks = Recording()
    progress = run(network(), tmp_path, hooks=hooks, epochs=2)
    epoch = ["before {0}", "after {0}"] * 4 + ["epoch"]
    assert hooks.calls == [call.format(lr) for lr in ("0.05", "0.005") for call in epoch]
    # What the hook leaves is what is evaluated: one class, a quarter of 48 images (12 of 50 are of class 2).
    assert [row["test_top1"] for row in progress.rows] == [24.0, 24.0]


def test_parameters_that_hooks_keep_to_themselves_are_not_optimised(tmp_path: Path) -> None:
    class OnlyTheHead(TrainingHooks):
        def optimized(self, model: nn.Module) -> list[nn.Parameter]:
            return list(model.get_submodule("5").parameters())

    model = network()
    run(model, tmp_path, hooks=OnlyTheHead())
    assert torch.equal(model.get_parameter("0.weight"), network().get_parameter("0.weight"))
    assert not torch.equal(model.get_parameter("5.weight"), network().get_parameter("5.weight"))


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_factors_go_on_from_a_checkpoint_to_the_same_bits(steps: int, tmp_path: Path) -> None:
    units = {"0": [(channel,) for channel in range(8)]}

    def prepared() -> tuple[nn.Module, ScalingFactors]:
        model, hooks = network(), ScalingFactors(units, strength=0.5, momentum=0.9)
        hooks.prepare(model)
        return model, hooks

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight, hooks = prepared()
    run(straight, tmp_path / "a", hooks=hooks)
    assert not torch.equal(straight.get_parameter("0.factor"), torch.ones(8))
    stopped, hooks = prepared()
    with pytest.raises(Interrupted):
        run(stopped, tmp_path / "b", hooks=hooks, interrupts=StopAfter(steps))
    resumed, hooks = prepared()
    run(resumed, tmp_path / "b", hooks=hooks)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 4),
        ("multistep", [1.0, 1.0, 0.1, 0.01]),
        ("cosine", [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    chosen = spec(lr=1.0, schedule=schedule, epochs=4, milestones=(2, 3))
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], chosen, fused=False)
    scheduler = build_scheduler(optimizer, chosen)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_a_gamma_for_each_milestone() -> None:
    # Soft filter pruning: a short warm-up, then unequal drops.
    chosen = spec(lr=0.01, epochs=6, milestones=(1, 3, 5), gammas=(10, 0.2, 0.5))
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], chosen, fused=False)
    scheduler = build_scheduler(optimizer, chosen)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01, 0.1, 0.1, 0.02, 0.02, 0.01])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("multistep", [1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01]),
        ("cosine", [1 / 3, 2 / 3, *((1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4))]),
    ],
)
def test_the_learning_rate_rises_before_the_schedule_begins(schedule: str, expected: list[float]) -> None:
    chosen = spec(lr=1.0, schedule=schedule, epochs=6, milestones=(3, 5), warmup=2)

    def rates(first: int, state: dict[str, object] | None) -> tuple[list[float], dict[str, object]]:
        optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], chosen, fused=False)
        scheduler = build_scheduler(optimizer, chosen)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
            scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        found = []
        for _ in range(first, min(6, first + 3)):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found, {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}

    before, state = rates(0, None)
    after, _ = rates(3, state)
    assert before + after == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_can_be_left_out_of_weight_decay(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model.parameters(), spec(optimizer=name, decay_norms=False), fused=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    decayed = {"0.weight", "5.weight"}
    assert found == {name: 1e-4 if name in decayed else 0.0 for name in dict(model.named_parameters())}
    (everything,) = build_optimizer(model.parameters(), spec(), fused=False).param_groups
    assert everything["weight_decay"] == 1e-4


@pytest.mark.parametrize("build", [timm_vit, lambda: torchvision.models.vit_b_16(num_classes=4), timm_swin])
def test_weight_decay_leaves_out_what_is_no_weight_of_a_layer(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
    chosen = spec(optimizer="adamw", decay_norms=False)
    decayed, free = build_optimizer(model.parameters(), chosen, fused=False, model=model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in free["params"]}
    assert {names[id(parameter)] for parameter in decayed["params"]} | found == set(names.values())
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    attention = {f"{n}.in_proj_weight" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert found == set(names.values()) - layers - attention
    # timm says the same of its own networks.
    said = getattr(model, "no_weight_decay", set)()
    assert said & set(names.values()) <= found


def test_options_that_are_not_used_leave_stage_keys_as_they_were() -> None:
    assert not {"warmup", "decay_norms", "label_smoothing"} & optimizer_key(spec()).keys()
    changed = spec(warmup=1, decay_norms=False, label_smoothing=0.1)
    added = {"warmup": 1, "decay_norms": False, "label_smoothing": 0.1}
    assert optimizer_key(changed) == {**optimizer_key(spec()), **added}


def test_labels_are_smoothed_in_training_alone(tmp_path: Path) -> None:
    losses = {}
    for smoothing in (0.0, 0.5):
        (tmp_path / str(smoothing)).mkdir()
        # At this rate the network stays as it is, so the losses are those of one network.
        progress = run(
            network(),
            tmp_path / str(smoothing),
            lr=1e-30,
            epochs=1,
            label_smoothing=smoothing,
        )
        losses[smoothing] = progress.rows[0]
    assert losses[0.5]["train_loss"] != losses[0.0]["train_loss"]
    assert losses[0.5]["test_loss"] == losses[0.0]["test_loss"]
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    model = nn.Linear(4, 4)
    step = build_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        NO_HOOKS,
        runtime=Runtime(CPU, "fp32"),
        label_smoothing=0.5,
    )
    loss, _ = step(logits, labels) / 6
    chances = torch.full((6, 4), 0.5 / 4) + 0.5 * nn.functional.one_hot(labels, 4)
    assert loss == pytest.approx((-chances * model(logits).log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_mixed_images_are_trained_on_with_the_shares_of_their_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    images, shares = torch.randn(6, 4, generator=generator), torch.rand(6, 4, generator=generator).softmax(1)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    logits = model(images).detach()
    for smoothing in (0.0, 0.3):
        step = build_step(model, optimizer, NO_HOOKS, runtime=Runtime(CPU, "fp32"), label_smoothing=smoothing)
        loss, correct = step(images, shares).tolist()
        smoothed = smoothing / 4 + (1 - smoothing) * shares
        assert loss == pytest.approx(-(smoothed * logits.log_softmax(1)).sum().item(), rel=1e-5)
        # The class with the largest share counts as the image's.
        assert correct == (logits.argmax(1) == shares.argmax(1)).sum().item()
    whole = nn.functional.one_hot(torch.arange(6) % 4, 4).float()
    assert step(images, whole).tolist() == pytest.approx(step(images, torch.arange(6) % 4).tolist(), rel=1e-6)


def test_top5_counts_every_image_whose_class_is_among_five() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Class c has rank c for every image.
            return -torch.arange(classes, dtype=torch.float32).expand(len(x), classes)

    for classes, top5 in ((4, None), (5, None), (8, 100 * 32 / 50)):
        pixels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8)
        batches = EvalBatches(DeviceImages(ImageArray(pixels, torch.arange(50) % classes), NORMALIZE), batch_size=7)
        result = evaluate(Fixed(), batches, runtime=Runtime(CPU, "fp32"))
        assert result.top5 == top5
        assert result.top1 == 100 * len(range(0, 50, classes)) / 50


def test_what_a_training_of_so_many_steps_takes_is_set_again_before_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noticing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                found.append(torch.backends.cudnn.benchmark)
                torch.backends.cudnn.benchmark = False  # as another training would in its turn
            return super().forward(x)

    def choose(runtime: Runtime, steps: int) -> Speed:
        asked.append(steps)
        return Speed(compiles=False, searches=True)

    found: list[bool] = []
    asked: list[int] = []
    monkeypatch.setattr(Runtime, "choose", choose)
    run(Noticing(nn.Flatten(), nn.Linear(192, 4)), tmp_path)
    assert asked == [12], "three epochs of four steps"
    assert found == [True] * 12


def test_adamw_is_torchs() -> None:
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], spec(optimizer="adamw", lr=0.01), fused=False)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_an_infinite_test_loss_is_a_failure_too(tmp_path: Path) -> None:
    class Overflowing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            return logits if self.training else logits * float("inf")

    with pytest.raises(Diverged, match=r"the test loss became (nan|inf) in epoch 1 at learning rate 0\.05"):
        run(Overflowing(nn.Flatten(), nn.Linear(192, 4)), tmp_path)
