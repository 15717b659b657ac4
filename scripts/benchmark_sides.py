"""What the benchmarks share: measured lines, and the trainings that are timed against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, VisionDataset

from rethink_prune.data import ImageArray, TrainBatches
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.normalization import Normalization
from rethink_prune.training import runtime as runtime_module
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Progress
from rethink_prune.training.runtime import Runtime, prepare_runtime
from rethink_prune.training.schedule import OptimizerSpec
from rethink_prune.training.train import train

BATCH_SIZE = 64
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# The paper's optimiser, at a rate at which no network diverges on random images.
SPEC = OptimizerSpec("sgd", 0.01, 0.9, False, 1e-4, "constant", 1, (), ())

Side = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """One measured quantity; `limit` is the least (``>=``) or greatest (``<=``) median asked for, if any."""

    part: str
    network: str
    what: str
    unit: str
    values: list[float]
    limit: tuple[str, float] | None = None

    def record(self) -> dict[str, Any]:
        """Return everything there is to say about it."""
        middle, reached = median(self.values), None
        if self.limit is not None:
            relation, bound = self.limit
            reached = middle >= bound if relation == ">=" else middle <= bound
        spread = {"n": len(self.values), "median": middle, "min": min(self.values), "max": max(self.values)}
        return {**asdict(self), **spread, "reached": reached}

    def __str__(self) -> str:
        record = self.record()
        text = "{part:9s}{network:10s}{what:30s}{median:9.3f} {unit:9s} [{min:.3f}, {max:.3f}]  n={n}".format_map(
            record
        )
        if self.limit is None:
            return text
        return f"{text}  asked {self.limit[0]} {self.limit[1]:g}: {'reached' if record['reached'] else 'MISSED'}"


def precisions(device: torch.device) -> list[str]:
    """Return float32, and bfloat16 where the hardware computes in it."""
    return sorted({"fp32", prepare_runtime(str(device)).precision}, reverse=True)


def take_turns(sides: Mapping[str, Side], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds each side took in each round, after one round that does not count.

    Every second round goes through them backwards, so that none always runs on the machine that another has warmed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            side = sides[name]
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def quotients(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def random_images(count: int) -> ImageArray:
    """Return images of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return ImageArray(images, torch.randint(0, 10, (count,), generator=generator))


def batches_of(split: ImageArray, device: torch.device) -> TrainBatches:
    """Return the framework's batches, augmented as the paper has it."""
    normalize = Normalization(MEAN, STD, image_size=32, device=device)
    return TrainBatches(DeviceImages(split, normalize, pad=4, flip=True, seed=0), BATCH_SIZE)


def with_search() -> Any:
    """Return a context in which cuDNN searches, as in a study: the trainings here are too short for it."""
    return mock.patch.object(runtime_module, "SEARCH_STEPS", 0)


def framework_side(
    model: nn.Module, split: ImageArray, device: torch.device, precision: str, accelerate: str = "auto"
) -> Side:
    """Return one epoch of the framework's own `train`, each time from the start, recordings included."""
    batches = batches_of(split, device)
    runtime = Runtime(device, precision, accelerate)

    def run() -> Progress:
        # A new folder each time, so that no round goes on from a checkpoint of the one before.
        with TemporaryDirectory() as folder, with_search():
            return train(
                model,
                batches,
                {},
                SPEC,
                runtime=runtime,
                hooks=TrainingHooks(),
                seed=0,
                checkpoints=Checkpoints(Path(folder)),
                interrupts=Interrupts(),
            )

    return run


class SyntheticCifar10(CIFAR10):
    """torchvision's CIFAR-10 on images from memory: its ``__getitem__``, without its files."""

    def __init__(self, split: ImageArray, transform: Callable[..., torch.Tensor]) -> None:
        VisionDataset.__init__(self, root="", transform=transform)
        self.data, self.targets = split.images.numpy(), split.labels.tolist()


def usual_side(model: nn.Module, split: ImageArray, device: torch.device, workers: int) -> Side:
    """Return one epoch of the script people write."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        SyntheticCifar10(split, transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,  # starting them is not what a long training spends its time on
    )
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=SPEC.lr, momentum=SPEC.momentum, weight_decay=SPEC.weight_decay)

    def run() -> tuple[float, float]:
        model.train()
        loss_sum, correct = 0.0, 0.0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
        return loss_sum / len(split), correct / len(split)

    return run
