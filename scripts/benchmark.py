"""Measure what this framework promises about speed and memory, on this machine.

    python scripts/benchmark.py                                  # everything
    python scripts/benchmark.py train --networks resnet20        # one part
    python scripts/benchmark.py overhead --steps 50 --json overhead.json

train     Images/s of the whole loop, data included, against the usual script: torchvision's CIFAR10 dataset with
          PIL transforms, a DataLoader (0 and 2 workers, the faster counts), float32, contiguous memory.
overhead  The whole loop against bare steps on ready tensors of the same memory format and precision.
surgery   Seconds of channel analysis and of cutting, and of a whole ``prune`` call.
memory    Peak resident memory of a process that loads CIFAR-10, trains, prunes and fine-tunes.

Sides take turns in one process (A B A B ...) after a warm-up round each, so that a machine that gets slower slows
both. Ratios are taken within a round. Every line gives the median, and in brackets the least and the greatest of
its n values. Images are random: no step depends on what they show. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, VisionDataset

from rethink_prune import build_model, prune
from rethink_prune.config import PrunerOptions
from rethink_prune.data import Split, TrainBatches
from rethink_prune.pruning import Target, find_pruner, surgery
from rethink_prune.pruning.channels import analyse
from rethink_prune.seeds import derive_generator
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.loop import Runtime, train
from rethink_prune.training.precision import autocast, resolve_device, resolve_precision
from rethink_prune.training.schedule import OptimizerSpec, build_optimizer

BATCH_SIZE = 64
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# The paper's optimiser, at a rate at which no network diverges on random images.
SPEC = OptimizerSpec("sgd", 0.01, 0.9, False, 1e-4, "constant", 1, (), 0.1)
# Least speed relative to the usual script, on a CPU.
TRAIN_TARGETS = {
    ("resnet20", "fp32"): 1.1,
    ("resnet20", "bf16"): 1.6,
    ("vgg16", "fp32"): 1.0,
    ("vgg16", "bf16"): 1.6,
}
NETWORKS = {
    "train": ["resnet20", "vgg16"],
    "overhead": ["resnet20"],
    "surgery": ["resnet110"],
    "memory": ["resnet20"],
}

Side = Callable[[], int]


@dataclass(frozen=True)
class Line:
    """One measured quantity; `limit` is the least (``>=``) or greatest (``<=``) median asked for, if any."""

    part: str
    network: str
    what: str
    unit: str
    values: list[float]
    limit: tuple[str, float] | None = None

    @property
    def reached(self) -> bool | None:
        if self.limit is None:
            return None
        relation, bound = self.limit
        return median(self.values) >= bound if relation == ">=" else median(self.values) <= bound

    def __str__(self) -> str:
        numbers = f"{median(self.values):9.3f} {self.unit:9s} [{min(self.values):.3f}, {max(self.values):.3f}]"
        text = f"{self.part:9s}{self.network:10s}{self.what:32s}{numbers}  n={len(self.values)}"
        if self.limit is None:
            return text
        return f"{text}  asked {self.limit[0]} {self.limit[1]:g}: {'reached' if self.reached else 'MISSED'}"

    def record(self) -> dict[str, Any]:
        spread = {"min": min(self.values), "max": max(self.values)}
        middle = {"n": len(self.values), "median": median(self.values), **spread}
        return {**asdict(self), **middle, "reached": self.reached}


def main() -> None:
    options = parse_arguments()
    device = resolve_device(options.device)
    torch.backends.cudnn.benchmark = True  # as a study has it; most scripts do, too
    described = describe_machine(device)
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    print(f"n = {options.rounds} rounds; train, overhead: {options.steps} steps of {BATCH_SIZE} images a round")
    parts = {"train": measure_train, "overhead": measure_overhead, "surgery": measure_surgery, "memory": measure_memory}
    lines: list[Line] = []
    for part in parts if options.part == "all" else [options.part]:
        for network in options.networks or NETWORKS[part]:
            found = parts[part](network, device, options)
            print(*found, sep="\n", flush=True)
            lines += found
    if options.json is not None:
        content = {"machine": described, "batch_size": BATCH_SIZE, "steps": options.steps}
        content["results"] = [line.record() for line in lines]
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--networks",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="for every chosen part; by default those the promises are about",
    )
    parser.add_argument("--rounds", type=int, default=7, help="n, after warm-up (%(default)s; memory at most 3)")
    parser.add_argument("--steps", type=int, default=20, help="training steps a round (%(default)s)")
    parser.add_argument("--train-limit", type=int, metavar="N", help="memory: train on N of the 50,000 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every value there")
    return parser.parse_args()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the versions and the hardware that the numbers depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), name)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
        "cpu": f"{name} x {os.cpu_count()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def precisions(device: torch.device) -> list[str]:
    """Return float32, and bfloat16 where the hardware computes in it."""
    return sorted({"fp32", resolve_precision("auto", device)}, reverse=True)


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds each side took in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def quotients(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def random_images(count: int) -> Split:
    """Return images of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def batches_of(split: Split, device: torch.device) -> TrainBatches:
    """Return the framework's batches, augmented as the paper has it."""
    return TrainBatches(split, mean=MEAN, std=STD, batch_size=BATCH_SIZE, pad=4, flip=True, device=device, seed=0)


def framework_side(model: nn.Module, split: Split, device: torch.device, precision: str) -> Side:
    """Return one epoch of the framework's own `train`; the call returns the images it used."""
    batches = batches_of(split, device)
    runtime = Runtime(device, precision)

    def run() -> int:
        # A new folder each time, so that no round goes on from the one before.
        with TemporaryDirectory() as folder:
            progress = train(
                model, batches, {}, SPEC, runtime=runtime, seed=0, checkpoints=Checkpoints(Path(folder)),
                interrupts=Interrupts(),
            )  # fmt: skip
        return int(progress.rows[-1]["images"])

    return run


class SyntheticCifar10(CIFAR10):
    """torchvision's CIFAR-10 on images from memory: its ``__getitem__``, without its files."""

    def __init__(self, split: Split, transform: Callable[..., torch.Tensor]) -> None:
        VisionDataset.__init__(self, root="", transform=transform)
        self.data, self.targets = split.images.numpy(), split.labels.tolist()


def usual_side(model: nn.Module, split: Split, device: torch.device, workers: int) -> Side:
    """Return one epoch of the script people write; the call returns the images it used."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(
        SyntheticCifar10(split, transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,  # starting them is not what a long training spends its time on
    )
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=SPEC.lr, momentum=SPEC.momentum, weight_decay=SPEC.weight_decay)

    def run() -> int:
        model.train()
        loss_sum, correct, seen = 0.0, 0, 0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        return seen

    return run


def bare_side(model: nn.Module, split: Split, device: torch.device, precision: str) -> Side:
    """Return forward, backward and step on ready batches; the call returns the images it used."""
    runtime = Runtime(device, precision)
    model = runtime.place(model)
    optimizer = build_optimizer(model.parameters(), SPEC, fused=device.type == "cuda")
    ready = list(batches_of(split, device).epoch(0))

    def run() -> int:
        model.train()
        seen = 0
        for images, labels in ready:
            with autocast(device, precision):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(labels)
        return seen

    return run


def measure_train(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    split = random_images(options.steps * BATCH_SIZE)
    usual = {
        f"usual, {workers} workers": usual_side(build_model(network), split, device, workers) for workers in (0, 2)
    }
    ours = {name: framework_side(build_model(network), split, device, name) for name in precisions(device)}
    seconds = take_turns({**usual, **ours}, options.rounds, device)
    lines = [
        Line("train", network, name, "images/s", [len(split) / value for value in values])
        for name, values in seconds.items()
    ]
    fastest = min(usual, key=lambda name: median(seconds[name]))
    for precision in ours:
        target = TRAIN_TARGETS.get((network, precision)) if device.type == "cpu" else None
        ratios = quotients(seconds[fastest], seconds[precision])
        limit = None if target is None else (">=", target)
        lines.append(Line("train", network, f"{precision} / {fastest}", "ratio", ratios, limit))
    return lines


def measure_overhead(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    split = random_images(options.steps * BATCH_SIZE)
    lines = []
    for precision in precisions(device):
        sides = {
            "bare": bare_side(build_model(network), split, device, precision),
            "loop": framework_side(build_model(network), split, device, precision),
        }
        seconds = take_turns(sides, options.rounds, device)
        for name, values in seconds.items():
            milliseconds = [1000 * value / options.steps for value in values]
            lines.append(Line("overhead", network, f"{name}, {precision}", "ms/step", milliseconds))
        ratios = quotients(seconds["loop"], seconds["bare"])
        lines.append(Line("overhead", network, f"loop / bare, {precision}", "ratio", ratios, ("<=", 1.03)))
    return lines


def measure_surgery(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    model, example = build_model(network), torch.zeros(1, 3, 32, 32)
    pruner = find_pruner("l1")
    target = Target(pruner, PrunerOptions(name="l1", ratio=0.5), model, example, network)
    scores = pruner.scores(model, target.groups, data=None, generator=derive_generator(0, "prune"))
    drop = target.drop(scores)
    sides = {
        "analyse": lambda: analyse(model, example),
        "plan + apply": lambda: surgery.apply(model, target.channels.plan(drop)),
        "prune(), whole call": lambda: prune(model, "l1", example=example, ratio=0.5),
    }
    seconds = take_turns(sides, options.rounds, torch.device("cpu"))
    both = [a + b for a, b in zip(seconds["analyse"], seconds["plan + apply"], strict=True)]
    lines = [Line("surgery", network, name, "s", values) for name, values in seconds.items()]
    return [*lines, Line("surgery", network, "analyse + plan + apply", "s", both, ("<=", 1.0))]


# torchvision refuses files whose checksum it does not know: the child lets it look only whether they are there.
# VmHWM, as ru_maxrss of a started process may be that of the one that started it.
STUDY = """
from pathlib import Path
from torchvision.datasets import CIFAR10
for files in (CIFAR10.train_list, CIFAR10.test_list):
    files[:] = [[name, None] for name, _ in files]
CIFAR10.meta["md5"] = None
from rethink_prune.__main__ import main
main()
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def measure_memory(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    if not Path("/proc/self/status").exists():
        sys.exit("memory: peak memory is read from /proc, which only Linux has")
    peaks = []
    for _ in range(min(options.rounds, 3)):
        with TemporaryDirectory() as folder:
            write_cifar10(Path(folder))
            # A checkpoint every second: making one takes memory, too.
            command = [
                sys.executable, "-c", STUDY, "dataset=cifar10", f"dataset.root={folder}", f"model={network}",
                "recipe=paper", "recipe.epochs=1", "recipe.finetune.epochs=1", "arms=[finetune]", f"device={device}",
                "store.root=store", "store.checkpoint_seconds=1", "hydra.run.dir=run",
                f"dataset.train_limit={options.train_limit or 'null'}",
            ]  # fmt: skip
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(int(done.stdout.split()[-1]) * 1024 / 1e9)
    limit = ("<=", 1.5) if device.type == "cpu" else None  # CUDA's own libraries are not ours to bound
    return [Line("memory", network, "peak of a study of CIFAR-10", "GB", peaks, limit)]


def write_cifar10(root: Path) -> None:
    """Write 50,000 + 10,000 random images as torchvision expects CIFAR-10 when unpacked."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        pixels = random.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        labels = (np.arange(10_000) % 10).tolist()  # the counts per class that a plan relies on
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    meta = {CIFAR10.meta["key"]: [f"class {i}" for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))


if __name__ == "__main__":
    main()
