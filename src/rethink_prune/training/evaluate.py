"""Loss and accuracy of a network over a set of images."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rethink_prune.data.batches import EvalBatches
from rethink_prune.outputs import loss_and_correct, main_output
from rethink_prune.seeds import seeded
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.recording import CudaRecorder, Recorded, Work, why_not_recorded
from rethink_prune.training.runtime import Runtime

Outputs = tuple[torch.Tensor, torch.Tensor]
Score = Work[Outputs]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy `loss`, and accuracies in percent; `top5` only where there are more than five classes."""

    loss: float
    top1: float
    top5: float | None = None

    @property
    def measures(self) -> dict[str, float]:
        """The values that there are, by name.

        Examples
        --------
        >>> Evaluation(loss=0.25, top1=90.0).measures
        {'loss': 0.25, 'top1': 90.0}
        """
        return {measure: value for measure, value in vars(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: EvalBatches,
    *,
    runtime: Runtime,
    processes: Processes = ALONE,
    score: Score | None = None,
) -> Evaluation:
    """Evaluate `model` on every image of `batches`; each image is counted once, by one of the processes.

    The network is left in evaluation mode. `score` is what `build_score` gave for the network: it pays where the
    network is evaluated again and again.

    Examples
    --------
    >>> from rethink_prune.data import ImageArray
    >>> from rethink_prune.data.device_images import DeviceImages
    >>> from rethink_prune.data.normalization import Normalization
    >>> cpu, images = torch.device("cpu"), torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    >>> images[..., 0] = 255  # red
    >>> array = ImageArray(images, torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]))
    >>> normalize = Normalization((0.5,) * 3, (0.25,) * 3, image_size=4, device=cpu)
    >>> batches = EvalBatches(DeviceImages(array, normalize), batch_size=3)
    >>> brightest = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # a logit for each colour
    >>> evaluate(brightest, batches, runtime=Runtime(cpu, "fp32")).top1
    75.0
    """
    model.eval()
    score = score or partial(_score_batch, model, runtime)
    # Loss, top-1 and top-5, summed on the device: reading a number per batch would make the host wait for it.
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    classes = 0
    # A network that draws random numbers in evaluation mode, too, draws the same ones wherever it is evaluated.
    with seeded(0):
        if runtime.device.type == "cuda":
            torch.cuda.manual_seed(0)  # training seeds it again before every step
        for images, labels in batches.part(processes.shard):
            sums, logits = score(runtime.take(images), labels)
            classes = logits.shape[1]
            totals += sums
    loss_sum, correct, within_top5 = processes.sum(totals).tolist()
    # A process whose part has no image has seen no logits.
    (classes,) = processes.max(classes)
    images_seen = len(batches)
    top5 = 100.0 * within_top5 / images_seen if classes > 5 else None
    return Evaluation(loss_sum / images_seen, 100.0 * correct / images_seen, top5)


def build_score(model: nn.Module, hooks: TrainingHooks, *, runtime: Runtime) -> Score:
    """Return what `evaluate` does with a batch: on CUDA recorded, wherever the steps of the training can be.

    Parameters
    ----------
    model : torch.nn.Module
        On the device. Its weights may change in place.
    hooks : TrainingHooks
        Of its training.

    Examples
    --------
    >>> score = build_score(nn.Identity(), TrainingHooks(), runtime=Runtime(torch.device("cpu"), "fp32"))
    >>> logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 1.0]])
    >>> sums, _ = score(logits, torch.tensor([1, 1]))  # loss, and images among the best and the five best
    >>> [round(value, 2) for value in sums.tolist()]
    [5.03, 1.0, 2.0]
    """
    plain = partial(_score_batch, model, runtime)
    if not runtime.accelerates_cuda or why_not_recorded(hooks):
        return plain
    return record_score(plain, model, CudaRecorder(runtime.device))


def record_score(plain: Score, model: nn.Module, recorder: CudaRecorder) -> Score:
    """Return the same work, replayed for full batches from where the tensors of `model` lie."""

    def addresses() -> list[int]:
        return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]

    return Recorded("evaluation", plain, recorder, constants=addresses)


def _score_batch(model: nn.Module, runtime: Runtime, images: torch.Tensor, labels: torch.Tensor) -> Outputs:
    """Return the summed loss, how many images are right, and right among five, as one tensor; and the logits."""
    with runtime.autocast():
        logits = main_output(model(images))
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    within_top5 = (best == labels[:, None]).any(1).sum()
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.cat([loss_and_correct(loss, logits, labels), within_top5.double()[None]]), logits
