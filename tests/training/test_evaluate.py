"""Recorded evaluation gives the numbers of plain evaluation, and gives way to it where it cannot be recorded."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import FakeRecorder
from rethink_prune.data import EvalBatches, ImageArray, TrainBatches
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.normalization import Normalization
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.evaluate import _score_batch, build_score, evaluate, record_score
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Row
from rethink_prune.training.recording import WARM_UP, Recorded, Work
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.training.train import train

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, "fp32")
SPEC = OptimizerSpec("sgd", 0.05, 0.9, False, 1e-4, "multistep", 3, (1,), (0.1,))
# Of 50 images: six full batches, and one of two.
FULL = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def images(device: torch.device = CPU) -> DeviceImages:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (50, 8, 8, 3), generator=generator, dtype=torch.uint8)
    normalize = Normalization((0.5,) * 3, (0.25,) * 3, image_size=8, device=device)
    return DeviceImages(ImageArray(pixels, torch.arange(50) % 10), normalize)


def batches(device: torch.device = CPU) -> EvalBatches:
    return EvalBatches(images(device), batch_size=8)


def recorded(model: nn.Module, recorder: FakeRecorder) -> Work:
    return record_score(partial(_score_batch, model, RUNTIME), model, recorder)


def change(model: nn.Module) -> None:
    """Change weights and running statistics in place, as an epoch does."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)


def test_replays_give_the_numbers_of_plain_evaluation_after_every_epoch() -> None:
    model, recorder = network(), FakeRecorder()
    score = recorded(model, recorder)
    for _ in range(3):
        expected = evaluate(model, batches(), runtime=RUNTIME)
        assert evaluate(model, batches(), runtime=RUNTIME, score=score) == expected
        assert expected.top5 is not None
        change(model)
    assert (recorder.warmed, recorder.recorded) == (WARM_UP, 1)
    assert recorder.replayed == 3 * FULL - WARM_UP, "a batch that is not full is not replayed"


def test_a_recording_is_made_anew_where_the_weights_have_moved() -> None:
    model, recorder = network(), FakeRecorder()
    score = recorded(model, recorder)
    evaluate(model, batches(), runtime=RUNTIME, score=score)
    kept = model[0].weight  # so that its memory is not used again
    model[0].weight = nn.Parameter(-kept.detach())
    expected = evaluate(model, batches(), runtime=RUNTIME)
    assert evaluate(model, batches(), runtime=RUNTIME, score=score) == expected
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (FakeRecorder(random=True), "the network draws random numbers"),
        (FakeRecorder(fails="operation not permitted\nwhen stream is capturing"), "operation not permitted"),
    ],
)
def test_what_cannot_be_recorded_is_evaluated_plainly(
    recorder: FakeRecorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    score = recorded(model, recorder)
    for _ in range(2):
        expected = evaluate(model, batches(), runtime=RUNTIME)
        assert evaluate(model, batches(), runtime=RUNTIME, score=score) == expected
    assert recorder.replayed == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"accelerate: no CUDA graph of evaluation, because {reason}; kernels are launched one by one"
    ]


def test_evaluation_is_recorded_where_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(TrainingHooks):
        def after_step(self, model: nn.Module, lr: float) -> None:
            self.steps = getattr(self, "steps", 0) + 1

    monkeypatch.setattr("rethink_prune.training.evaluate.CudaRecorder", lambda device: FakeRecorder())
    on_cuda = Runtime(torch.device("cuda"), "fp32")
    assert isinstance(build_score(network(), TrainingHooks(), runtime=on_cuda), Recorded)
    for hooks, runtime in (
        (Counting(), on_cuda),
        (TrainingHooks(), Runtime(torch.device("cuda"), "fp32", "off")),
        (TrainingHooks(), RUNTIME),
    ):
        assert not isinstance(build_score(network(), hooks, runtime=runtime), Recorded)


def rows_of_training(folder: Path) -> list[Row]:
    folder.mkdir()
    return train(
        network(),
        TrainBatches(images(), batch_size=8),
        {"test": batches(), "validation": batches()},
        SPEC,
        runtime=RUNTIME,
        hooks=TrainingHooks(),
        seed=0,
        checkpoints=Checkpoints(folder),
        interrupts=Interrupts(),
    ).rows


def test_a_training_records_its_steps_and_its_evaluation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rows_of_training(tmp_path / "plain")
    recorders: dict[str, FakeRecorder] = {}
    for name in ("step", "evaluate"):
        recorders[name] = FakeRecorder()
        monkeypatch.setattr(f"rethink_prune.training.{name}.CudaRecorder", lambda device, name=name: recorders[name])
    monkeypatch.setattr(Runtime, "accelerates_cuda", True)
    for row, expected in zip(rows_of_training(tmp_path / "recorded"), plain, strict=True):
        # The fused optimiser rounds otherwise.
        assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-4)
    assert recorders["step"].recorded == 1, "learning rates are read from the device"
    assert recorders["evaluate"].recorded == 1, "for both sets of images"
    assert recorders["evaluate"].replayed == 3 * 2 * FULL - WARM_UP


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_evaluate_as_plain_passes_do(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    runtime = Runtime(device, precision)
    model = runtime.place(network())
    score = build_score(model, TrainingHooks(), runtime=runtime)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            expected = evaluate(model, batches(device), runtime=runtime)
            found = evaluate(model, batches(device), runtime=runtime, score=score)
            assert found.loss == pytest.approx(expected.loss, rel=1e-3)
            assert found.top1 == pytest.approx(expected.top1, abs=2.0)  # one image of 50
            change(model)
    assert isinstance(score, Recorded)
    assert not caplog.records, "nothing fell back"
