"""What is trained: what a step does with a batch, and how a network is judged."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.optim import Optimizer

from rethink_prune.training.distillation import Teacher
from rethink_prune.training.distributed import Processes
from rethink_prune.training.evaluate import build_score, evaluate
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime
from rethink_prune.training.step import Step, build_step

Judge = Callable[[Any], Mapping[str, float]]


class Task(Protocol):
    """A kind of training.

    Attributes
    ----------
    fixed_shapes : bool
        Whether nearly all steps have the same shapes; otherwise nothing is compiled or searched for them.
    """

    fixed_shapes: ClassVar[bool]

    def build_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        hooks: TrainingHooks,
        *,
        runtime: Runtime,
        forward: nn.Module,
        label_smoothing: float,
        teacher: Teacher | None,
        compiles: bool,
    ) -> Step:
        """Return what is done with a batch; arguments as of `rethink_prune.training.step.build_step`."""

    def build_judge(self, model: nn.Module, hooks: TrainingHooks, *, runtime: Runtime, processes: Processes) -> Judge:
        """Return what judges the network on a set, as values by measure; a value ``loss`` has to be finite."""

    def trained(self, loss: float, other: float, count: int) -> Mapping[str, float]:
        """Return an epoch's columns, from the sums that its steps gave over `count` images; ``train_loss`` is one."""


class _Classification:
    """Cross-entropy, and the share of images that are classified correctly."""

    fixed_shapes: ClassVar[bool] = True

    def build_step(self, model: nn.Module, optimizer: Optimizer, hooks: TrainingHooks, **options: Any) -> Step:
        """Return the fastest step there is."""
        return build_step(model, optimizer, hooks, **options)

    def build_judge(self, model: nn.Module, hooks: TrainingHooks, *, runtime: Runtime, processes: Processes) -> Judge:
        """Return what gives loss and accuracies."""
        score = build_score(model, hooks, runtime=runtime)

        def judge(batches: Any) -> Mapping[str, float]:
            return evaluate(model, batches, runtime=runtime, processes=processes, score=score).measures

        return judge

    def trained(self, loss: float, other: float, count: int) -> Mapping[str, float]:
        """Return loss and accuracy in percent."""
        return {"train_loss": loss / count, "train_top1": 100.0 * other / count}


CLASSIFICATION: Task = _Classification()
