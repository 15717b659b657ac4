"""Detection as a task of the training loop: the step of a detector, and its average precision."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rethink_prune.detection.average_precision import coco_map, voc_map
from rethink_prune.detection.batches import DetectionTarget, TestPictures
from rethink_prune.seeds import seeded
from rethink_prune.surgery.architecture import Masks
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.hooks import HeldMasks, TrainingHooks
from rethink_prune.training.recording import warn_not_recorded
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.step import Step, translate_refused_operations, update
from rethink_prune.training.task import Judge

# The prefix of the columns with the average precision of a class.
AP = "ap/"


class DetectorHooks(HeldMasks):
    """Keeps masked weights at zero, leaves frozen ones alone, and limits the gradients.

    Parameters
    ----------
    masks : mapping of str to torch.Tensor
        By the names of the detector's parameters.
    clip_norm : float, optional
        Largest norm of all gradients together.
    """

    def __init__(self, masks: Masks, clip_norm: float | None) -> None:
        super().__init__(masks)
        self._clip_norm = clip_norm

    def optimized(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are not frozen."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def before_step(self, model: nn.Module, lr: float) -> None:
        """Set the gradients of masked weights to zero, then limit the norm of all."""
        super().before_step(model, lr)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.optimized(model), self._clip_norm)


@dataclass(frozen=True)
class _DetectorStep:
    model: nn.Module
    forward: nn.Module
    optimizer: Optimizer
    hooks: TrainingHooks
    runtime: Runtime

    def __call__(self, images: Any, labels: Any, weight: float = 1.0) -> Tensor:
        with translate_refused_operations():
            with self.runtime.autocast():
                losses = self.forward(images, labels)
            loss = torch.stack([each.float() for each in losses.values()]).sum()
            update(self.model, loss * weight, self.optimizer, self.hooks)
        return torch.stack([loss.detach().double() * len(images), torch.zeros_like(loss, dtype=torch.float64)])


@dataclass(frozen=True)
class Detection:
    """The task: the sum of the four losses of Faster R-CNN, and the average precision of VOC 2007.

    Attributes
    ----------
    classes : tuple of str
        Without the background.
    """

    fixed_shapes: ClassVar[bool] = False
    classes: tuple[str, ...]

    def build_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        hooks: TrainingHooks,
        *,
        runtime: Runtime,
        forward: nn.Module,
        **unused: Any,
    ) -> Step:
        """Return the step, neither recorded nor compiled: its shapes differ from batch to batch."""
        if runtime.accelerates_cuda:
            warn_not_recorded("a detector's training", "the shapes of its steps differ")
        return _DetectorStep(model, forward, optimizer, hooks, runtime)

    def build_judge(self, model: nn.Module, hooks: TrainingHooks, *, runtime: Runtime, processes: Processes) -> Judge:
        """Return what gives ``map``, and ``ap/<class>`` for each class, in percent."""

        def judge(pictures: TestPictures) -> Mapping[str, float]:
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                # The last step broke it, after its loss was taken.
                return {"loss": math.nan}
            return average_precision(model, pictures, self.classes, runtime=runtime, processes=processes)

        return judge

    def trained(self, loss: float, other: float, count: int) -> Mapping[str, float]:
        """Return the loss."""
        return {"train_loss": loss / count}


def average_precision(
    model: nn.Module,
    pictures: TestPictures,
    classes: tuple[str, ...],
    *,
    runtime: Runtime,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Return ``map`` of VOC 2007, ``ap/<class>`` for each class in the pictures, and, where installed, ``coco_map``."""
    predictions, targets = detect(model, pictures, runtime=runtime, processes=processes)
    found = voc_map(predictions, targets, inclusive=False)  # boxes have edges
    by_class = {f"{AP}{classes[label - 1]}": value for label, value in found["ap"].items()}
    coco = coco_map(predictions, targets) or {}
    return {"map": found["map"], **by_class, **{f"coco_{name}": value for name, value in coco.items()}}


@torch.no_grad()
def detect(
    model: nn.Module, pictures: TestPictures, *, runtime: Runtime, processes: Processes = ALONE
) -> tuple[list[DetectionTarget], list[DetectionTarget]]:
    """Return what a detector finds in every picture, and what is in it, on the CPU.

    The detector is left in evaluation mode.
    """
    model.eval()
    own: list[tuple[DetectionTarget, DetectionTarget]] = []
    with seeded(0):
        for images, targets in pictures.part(processes.shard):
            with runtime.autocast():
                found = model(images)
            for prediction, target in zip(found, targets, strict=True):
                own.append(
                    (
                        {name: t.float().cpu() if t.is_floating_point() else t.cpu() for name, t in prediction.items()},
                        {name: tensor.cpu() for name, tensor in target.items()},
                    )
                )
    pairs = [pair for part in processes.gather(own) for pair in part]
    return [prediction for prediction, _ in pairs], [target for _, target in pairs]
