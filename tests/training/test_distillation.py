"""A teacher's part in the loss: the published formula, in any kind of step, and a teacher that stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness import FakeRecorder
from rethink_prune.training.distillation import Teacher
from rethink_prune.training.distributed import ALONE
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.recording import WARM_UP
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer
from rethink_prune.training.step import build_step, record_step

CPU = torch.device("cpu")
PLAIN = Runtime(CPU, "fp32", "off")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4) for n in (*[16] * (count - 1), 5)]


def losses(
    student: nn.Module, teacher: Teacher | None, *, recorder: FakeRecorder | None = None, runtime: Runtime = PLAIN
) -> list[float]:
    """Train a network with a teacher and return the losses."""
    spec = OptimizerSpec("sgd", 0.05, 0.9, False, 1e-4, "constant", 1, (), ())
    student, device = runtime.place(student), runtime.device
    optimizer = build_optimizer(student.parameters(), spec, fused=runtime.accelerates_cuda)
    ready = teacher and teacher.prepare(runtime, ALONE)
    step = build_step(student, optimizer, TrainingHooks(), runtime=runtime, teacher=ready)
    if recorder is not None:
        step = record_step(step, student, optimizer, recorder)  # type: ignore[arg-type]
    found = []
    for images, labels in batches():
        student.train()
        found.append(float(step(runtime.take(images.to(device)), labels.to(device))[0]))
    return found


def test_the_loss_is_the_published_one_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, lesson = (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, temperature, weight = torch.arange(6) % 5, 4.0, 0.9
    logits.requires_grad_()

    class Says(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return lesson

    teacher = Teacher(Says(), temperature, weight)
    loss = teacher.loss(torch.zeros(6, 1), logits, labels, runtime=PLAIN)
    loss.backward()
    # By hand: sums of probabilities and their logarithms.
    told, asked = (lesson / temperature).softmax(1), (logits.detach() / temperature).softmax(1)
    divergence = (told * (told / asked).log()).sum(1).mean()
    labels_loss = -logits.detach().softmax(1)[torch.arange(6), labels].log().mean()
    expected = weight * temperature**2 * divergence + (1 - weight) * labels_loss
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
    hard = logits.detach().softmax(1) - nn.functional.one_hot(labels, 5)
    gradient = (weight * temperature * (asked - told) + (1 - weight) * hard) / 6
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-7)


def test_a_step_with_a_teacher_teaches() -> None:
    images, labels = batches()[0]
    good = Teacher(network(1), temperature=1.0, weight=1.0)
    student = network(2)
    before = good.loss(images, student(images), labels, runtime=PLAIN)
    losses(student, good)
    student.train()
    assert bool(good.loss(images, student(images), labels, runtime=PLAIN) < before / 2)
    assert losses(network(2), None) != losses(network(2), Teacher(network(1), 4.0, 0.5))


def test_the_teacher_stays_as_it_is() -> None:
    teacher = network(1)
    before = copy.deepcopy(teacher.state_dict())
    losses(network(2), Teacher(teacher, 4.0, 0.9))
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_replayed_steps_with_a_teacher_are_plain_ones() -> None:
    recorder = FakeRecorder()
    expected, found = network(2), network(2)
    assert losses(found, Teacher(network(1), 4.0, 0.9), recorder=recorder) == losses(
        expected, Teacher(network(1), 4.0, 0.9)
    )
    assert (recorder.recorded, recorder.replayed) == (1, 11 - WARM_UP)
    states = zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_labels_are_smoothed_in_their_own_part() -> None:
    logits, labels = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([0])
    teacher = Teacher(nn.Identity(), temperature=2.0, weight=0.25)
    smooth = teacher.loss(logits, logits, labels, runtime=PLAIN, label_smoothing=0.3)
    expected = 0.75 * nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert float(smooth) == pytest.approx(float(expected))


def test_labels_of_mixed_images_have_their_own_part() -> None:
    logits, shares = torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[0.75, 0.0, 0.25]])
    teacher = Teacher(nn.Identity(), temperature=2.0, weight=0.25)
    found = teacher.loss(logits, logits, shares, runtime=PLAIN)
    assert float(found) == pytest.approx(0.75 * float(-(shares * logits.log_softmax(1)).sum()))


@pytest.mark.cuda
def test_cuda_graphs_with_a_teacher_train_as_plain_steps(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    expected = losses(network(2), Teacher(network(1), 4.0, 0.9), runtime=Runtime(device, "fp32", "off"))
    found = losses(network(2), Teacher(network(1), 4.0, 0.9), runtime=Runtime(device, "fp32"))
    assert not caplog.records, "nothing fell back"
    assert found == pytest.approx(expected, rel=1e-3)
