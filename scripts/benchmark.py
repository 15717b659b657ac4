"""Measure what this framework promises about speed and memory, on this machine.

    python scripts/benchmark.py                                  # everything
    python scripts/benchmark.py train --networks resnet20        # one part
    python scripts/benchmark.py overhead --steps 50 --json overhead.json
    python scripts/benchmark.py data --images photographs.tar

train     Images/s of the whole loop, data included, against the usual script: torchvision's CIFAR10 with
          PIL transforms, a DataLoader (the faster of 0 and 2 workers, on CUDA 2 and 8), float32, contiguous memory.
          With --device cuda, --lines says what is measured:
            loop           that, and plain steps (accelerate=off)
            evaluation     images/s with the evaluation after every epoch
            card           the card's bf16 matrix rate and memory bandwidth, and what share of them is used
            batches        microseconds to make a batch, augmented on the card
            compile        as evaluation, with torch.compile
            processes      --together trainings at once, as processes
            streams        steps alone, as streams of one process
            together       --together trainings that take turns in one process, plain and compiled
            deterministic  what deterministic kernels cost
            study          for vgg16, a whole L1 study and --together seeds of it at once, projected from --epochs
                           epochs of each of its two networks, evaluation included
          The first three are the default. With the default networks they should take less than four minutes on an
          H100.
overhead  The whole loop against bare steps (forward, backward, update) on ready tensors of the same memory
          format and precision, and what the loop adds: its time with the bare step taken out, as a share of that
          step. On a CPU, loop and bare steps have one thread and take turns in one process, a step each, because
          a machine varies by more than the loop costs.
evaluate  Images/s of evaluation, recorded as a CUDA graph or not; the same on a CPU, which records nothing.
surgery   Seconds of channel analysis, of cutting, and of a whole ``prune`` call.
pruners   Seconds of a whole ``prune`` call of each pruner, and what it adds to the peak resident memory of its
          process: half of what it ranks goes, of a network with random weights, scales and images (1,000 of
          32 x 32 for those that look at images). `sss` removes what its training has set to zero: here, every
          other unit. --pruners says which.
memory    Peak resident memory of a process that loads CIFAR-10, trains, prunes and fine-tunes.
data      Images/s of one core that makes ImageNet batches of the photographs in --images FOLDER_OR_TAR, mirroring and
          normalising included, against the usual script: torchvision's ImageFolder, RandomResizedCrop,
          RandomHorizontalFlip, ToTensor and Normalize on PIL images, and a DataLoader. Both without workers.
startup   Seconds of ``--help``, and until the first training step of the digits study is done.

Sides take turns in one process (A B A B ...) after a warm-up round, so that a machine that slows down slows
them all; ratios are taken within a round. Every line gives the median of n values, and in brackets the least
and the greatest. Images are random: no speed depends on what they show. Let nothing else run meanwhile. A line is
printed, and written to --json, as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from benchmark_gpu import GPU_LINES, measure_gpu
from benchmark_sides import (
    BATCH_SIZE,
    MEAN,
    SPEC,
    STD,
    Line,
    Side,
    batches_of,
    framework_side,
    precisions,
    quotients,
    random_images,
    take_turns,
    usual_side,
    with_search,
)
from rethink_prune import build_model, prune
from rethink_prune.config import parse_pruner
from rethink_prune.data import EvalBatches, ImageArray, ImageFiles, TrainBatches
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.normalization import Normalization
from rethink_prune.data.streamed_images import StreamedImages
from rethink_prune.data.workers import BatchReader
from rethink_prune.errors import UserError
from rethink_prune.outputs import loss_and_correct
from rethink_prune.pruning import PRUNERS, find_pruner
from rethink_prune.surgery import cut
from rethink_prune.surgery.channels import analyse
from rethink_prune.training import task
from rethink_prune.training import train as loop
from rethink_prune.training.evaluate import build_score, evaluate
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.runtime import Runtime, prepare_runtime
from rethink_prune.training.schedule import build_optimizer
from rethink_prune.training.step import build_step
from rethink_prune.turns import do_in_turns, pass_turn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_BATCH = 256
# Least speed relative to the usual script, on a CPU.
TRAIN_TARGETS = {
    ("resnet20", "fp32"): 1.1,
    ("resnet20", "bf16"): 1.6,
    ("vgg16", "fp32"): 1.0,
    ("vgg16", "bf16"): 1.6,
}
# The same on CUDA, where these networks are measured.
CUDA_TARGETS = {("vgg16", "bf16"): 10.0, ("resnet56", "bf16"): 10.0}
CUDA_NETWORKS = ["vgg16", "resnet56"]
CUDA_LINES = ["loop", "evaluation", "card"]
# The sides that wait for Python train on a fifth of the steps, as their images/s do not depend on how many.
SLOW_SHARE = 5


def main() -> None:
    options = parse_arguments()
    device = prepare_runtime(options.device).device
    on_cuda = device.type == "cuda"
    # Full epochs of CIFAR-10 on CUDA, so that recording a step weighs what it weighs in a study.
    options.steps = options.steps or (782 if on_cuda else 20)
    options.rounds = options.rounds or (2 if on_cuda else 7)
    torch.backends.cudnn.benchmark = True  # as a long training has it; most scripts do, too
    described = describe_machine(device)
    print("  ".join(f"{name} {value}" for name, value in described.items()))
    print(f"train, overhead: {options.steps} steps of {BATCH_SIZE} images a round", flush=True)
    content: dict[str, Any] = {"machine": described, "batch_size": BATCH_SIZE, "steps": options.steps, "results": []}
    for part in PARTS if options.part == "all" else [options.part]:
        measure, networks = PARTS[part]
        if part == "data" and options.images is None:
            if options.part == "data":
                sys.exit("data: give photographs with --images FOLDER_OR_TAR")
            print("data: left out, for it needs --images")
            continue
        if part == "train" and on_cuda:
            networks = CUDA_NETWORKS
        for network in options.networks or networks:
            for line in measure(network, device, options):
                print(line, flush=True)
                content["results"].append(line.record())
                if options.json is not None:
                    options.json.write_text(json.dumps(content, indent=2) + "\n")
        if part == "train" and not on_cuda:
            print("train: a whole study is not projected without a GPU")


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
        return int(text)

    def chosen_of(*there: str) -> Callable[[str], list[str]]:
        def chosen(text: str) -> list[str]:
            names = list(there) if text == "all" else text.split(",")
            if unknown := sorted(set(names) - set(there)):
                raise argparse.ArgumentTypeError(f"{','.join(unknown)}: must be of {', '.join(there)}, or all")
            return names

        return chosen

    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), metavar="A,B", help="other than those promised for"
    )
    parser.add_argument("--rounds", type=positive, help="n (7; on CUDA 2; memory, pruners, startup at most 3)")
    parser.add_argument(
        "--lines",
        type=chosen_of("loop", *GPU_LINES),
        metavar="A,B",
        default=CUDA_LINES,
        help=f"train on CUDA: what is measured, or all ({','.join(CUDA_LINES)})",
    )
    parser.add_argument("--steps", type=positive, help="training steps a round (20; on CUDA 782, an epoch of CIFAR-10)")
    parser.add_argument("--epochs", type=positive, default=20, help="train on CUDA: epochs of a study (%(default)s)")
    parser.add_argument("--together", type=positive, default=5, help="train on CUDA: trainings at once (%(default)s)")
    parser.add_argument(
        "--pruners",
        type=chosen_of(*PRUNERS),
        metavar="A,B",
        default=list(PRUNERS),
        help="pruners: which of them (all)",
    )
    parser.add_argument("--train-limit", type=positive, metavar="N", help="memory: train on so many images")
    parser.add_argument("--images", type=Path, metavar="FOLDER_OR_TAR", help="data: JPEG files in folders of classes")
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


def empty_side(model: nn.Module, split: ImageArray, device: torch.device, precision: str) -> Side:
    """Return the framework's epoch with forward, backward and update taken out: everything else it does."""
    run = framework_side(model, split, device, precision)
    loss, logits = torch.zeros((), device=device), torch.zeros(BATCH_SIZE, 10, device=device)

    def no_step(images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        return loss_and_correct(loss, logits[: len(labels)], labels)

    def run_empty() -> object:
        with (
            mock.patch.object(task, "build_step", side_effect=lambda *parts, **options: no_step),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # that the schedule advances without the optimiser
            return run()

    return run_empty


def bare_side(model: nn.Module, split: ImageArray, device: torch.device, precision: str) -> Side:
    """Return an epoch of nothing but forward, backward and step, on batches made beforehand."""
    runtime = Runtime(device, precision)
    model = runtime.place(model)
    optimizer = build_optimizer(model.parameters(), SPEC, fused=device.type == "cuda")
    ready = list(batches_of(split, device).epoch(0))

    def run() -> None:
        model.train()
        for images, labels in ready:
            with runtime.autocast():
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loop.pass_turn()

    return run


def measure_train(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    on_cuda = device.type == "cuda"
    if not on_cuda or "loop" in options.lines:
        yield from measure_loop(network, device, options)
    if on_cuda:
        yield from measure_gpu(network, device, options)


def measure_loop(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    on_cuda = device.type == "cuda"
    split = random_images(options.steps * BATCH_SIZE)
    few = random_images(math.ceil(options.steps / SLOW_SHARE) * BATCH_SIZE) if on_cuda else split
    sides: dict[str, Side] = {}
    # With a GPU, two workers make it wait.
    for workers in (min(8, os.cpu_count() or 1),) if on_cuda else (0, 2):
        sides[f"usual, {workers} workers"] = usual_side(build_model(network), few, device, workers)
    if on_cuda:
        sides["plain, fp32"] = framework_side(build_model(network), few, device, "fp32", "off")
    images = dict.fromkeys(sides, len(few))
    for precision in precisions(device):
        sides[precision] = framework_side(build_model(network), split, device, precision)
        images[precision] = len(split)
    seconds = take_turns(sides, options.rounds, device)
    rates = {name: [images[name] / value for value in values] for name, values in seconds.items()}
    for name, values in rates.items():
        yield Line("train", network, name, "images/s", values)
    usual = max((name for name in sides if "workers" in name), key=lambda name: median(rates[name]))
    targets = CUDA_TARGETS if on_cuda else TRAIN_TARGETS
    for precision in precisions(device):
        target = targets.get((network, precision))
        limit = None if target is None else (">=", target)
        ratios = quotients(rates[precision], rates[usual])
        yield Line("train", network, f"{precision} / {usual}", "ratio", ratios, limit)


def measure_overhead(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    split = random_images(options.steps * BATCH_SIZE)
    for precision in precisions(device):
        sides: dict[str, Side] = {
            "bare": bare_side(build_model(network), split, device, precision),
            "loop": framework_side(build_model(network), split, device, precision),
            "loop, empty": empty_side(build_model(network), split, device, precision),
        }
        both = {name: sides.pop(name) for name in ("bare", "loop")}
        if device.type == "cuda":  # which goes on with a step while the next is launched
            seconds = take_turns({**both, **sides}, options.rounds, device)
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as those that take turns
            seconds = take_steps_in_turn(both, options.rounds) | take_turns(sides, options.rounds, device)
            torch.set_num_threads(threads)
        for name, values in seconds.items():
            milliseconds = [1000 * value / options.steps for value in values]
            yield Line("overhead", network, f"{name}, {precision}", "ms/step", milliseconds)
        ratios = quotients(seconds["loop"], seconds["bare"])
        limit = ("<=", 1.03) if device.type == "cpu" else None
        yield Line("overhead", network, f"loop / bare, {precision}", "ratio", ratios, limit)
        added = [100 * share for share in quotients(seconds["loop, empty"], seconds["bare"])]
        yield Line("overhead", network, f"added by the loop, {precision}", "%", added, ("<=", 3.0))


def take_steps_in_turn(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds each side took in each round, after one that does not count; sides take turns step by step.

    So a slow moment of the machine meets both. Each side has one thread.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    resumed = 0.0

    def stop_watch() -> None:
        seconds[threading.current_thread().name][-1] += time.perf_counter() - resumed

    def timed_turn() -> None:
        nonlocal resumed
        stop_watch()
        pass_turn()
        resumed = time.perf_counter()

    def work(name: str) -> None:
        nonlocal resumed
        threading.current_thread().name = name
        torch.set_num_threads(1)
        resumed = time.perf_counter()
        sides[name]()
        stop_watch()

    with mock.patch.object(loop, "pass_turn", timed_turn):
        for number in range(1 + rounds):
            for values in seconds.values():
                values.append(0.0)
            works = [partial(work, name) for name in list(sides)[:: 1 if number % 2 else -1]]
            for outcome in do_in_turns(works, at_once=2):
                if isinstance(outcome, BaseException):
                    raise outcome
    return {name: values[1:] for name, values in seconds.items()}


def evaluation_side(model: nn.Module, split: ImageArray, device: torch.device, precision: str, recorded: bool) -> Side:
    """Return an evaluation of all images; recorded, as `train` evaluates, or not."""
    runtime = Runtime(device, precision)
    model = runtime.place(model)
    batches = EvalBatches(DeviceImages(split, Normalization(MEAN, STD, image_size=32, device=device)), batch_size=256)
    score = build_score(model, TrainingHooks(), runtime=runtime) if recorded else None
    return lambda: evaluate(model, batches, runtime=runtime, score=score)


def measure_evaluation(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    split = random_images(options.steps * BATCH_SIZE)
    for precision in precisions(device):
        sides = {
            f"{name}, {precision}": evaluation_side(build_model(network), split, device, precision, name == "recorded")
            for name in ("recorded", "not recorded")
        }
        seconds = take_turns(sides, options.rounds, device)
        for name, values in seconds.items():
            yield Line("evaluate", network, name, "images/s", [len(split) / value for value in values])
        recorded, plain = seconds.values()
        yield Line("evaluate", network, f"recorded / not, {precision}", "ratio", quotients(plain, recorded))


def measure_surgery(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    model, example = build_model(network), torch.zeros(1, 3, 32, 32)
    l1 = find_pruner("l1")
    pruner = l1(parse_pruner({"name": "l1", "ratio": 0.5}, l1.options_type))
    target: Any = pruner.target(model, example, network)
    drop = target.choose(pruner.scores(model, target.groups, data=None, generator=torch.Generator())).drop
    sides: dict[str, Side] = {
        "analysis": lambda: analyse(model, example),
        "surgery": lambda: cut.apply(model, target.channels.plan(drop)),
        "prune(), whole call": lambda: prune(model, "l1", example=example, ratio=0.5),
    }
    seconds = take_turns(sides, options.rounds, torch.device("cpu"))  # pruning always happens there
    lines = [Line("surgery", network, name, "s", values) for name, values in seconds.items()]
    both = [a + b for a, b in zip(seconds["analysis"], seconds["surgery"], strict=True)]
    return [*lines, Line("surgery", network, "analysis + surgery", "s", both, ("<=", 1.0))]


# Prints seconds, and bytes added to the peak. A process of its own for each call: peaks only ever grow.
PRUNE = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from rethink_prune import build_model, prune
def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
pruner, network, device = sys.argv[1:]
torch.manual_seed(0)
model = build_model(network)
norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
for norm in norms:
    nn.init.uniform_(norm.weight)
if pruner == "sss":  # half of what it can remove: channels of VGG, blocks of a ResNet
    for weight in [n.weight.data[::2] for n in norms] if network == "vgg16" else [n.weight.data for n in norms[2::4]]:
        weight.zero_()
options = {} if pruner == "sss" else {"ratio": 0.5}
batches = [(torch.rand(100, 3, 32, 32, device=device), torch.arange(100) % 10) for _ in range(10)]
with torch.no_grad():
    model.eval()(torch.zeros(1, 3, 32, 32))
before, start = peak(), time.perf_counter()
prune(model, pruner, example=torch.zeros(1, 3, 32, 32), data=batches, **options)
print(time.perf_counter() - start, peak() - before)
"""


def measure_pruners(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    if not Path("/proc/self/status").exists():
        sys.exit("pruners: the peak is read from /proc, which only Linux has")
    for pruner in options.pruners:
        if (network, pruner) == ("densenet40", "sss"):
            continue  # nothing there that it can remove
        seconds, peaks = [], []
        for _ in range(min(options.rounds, 3)):
            command = [sys.executable, "-c", PRUNE, pruner, network, str(device)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values = done.stdout.split()
            seconds.append(float(values[0]))
            peaks.append(int(values[1]) / 1e9)
        on_cpu = device.type == "cpu" and (network, pruner) == ("vgg16", "thinet")
        yield Line("pruners", network, pruner, "s", seconds, ("<=", 60.0) if on_cpu else None)
        yield Line("pruners", network, f"{pruner}, added to the peak", "GB", peaks)


# torchvision refuses files whose checksum it does not know: here it only looks whether they are there. The peak
# is VmHWM, for ru_maxrss of a process can be that of the one that started it.
STUDY = """
from pathlib import Path
from torchvision.datasets import CIFAR10
for files in (CIFAR10.train_list, CIFAR10.test_list):
    files[:] = [[name, None] for name, _ in files]
CIFAR10.meta["md5"] = None
from rethink_prune.__main__ import main
main()
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def measure_memory(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    if not Path("/proc/self/status").exists():
        sys.exit("memory: the peak is read from /proc, which only Linux has")
    peaks = []
    with TemporaryDirectory() as folder:
        write_cifar10(Path(folder))
        for n in range(min(options.rounds, 3)):
            overrides = [
                *("dataset=cifar10", f"dataset.root={folder}", f"model={network}", f"device={device}"),
                *("recipe=paper", "recipe.epochs=1", "recipe.finetune.epochs=1", "arms=[finetune]"),
                f"dataset.train_limit={options.train_limit or 'null'}",
                *(f"store.root=store{n}", f"hydra.run.dir=run{n}"),
                "store.checkpoint_seconds=1",  # making a checkpoint takes memory, too
            ]
            command = [sys.executable, "-c", STUDY, *overrides]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(int(done.stdout.split()[-1]) * 1024 / 1e9)
    limit = ("<=", 1.5) if device.type == "cpu" else None  # CUDA's libraries alone take more
    return [Line("memory", network, "peak of a CIFAR-10 study", "GB", peaks, limit)]


def write_cifar10(root: Path) -> None:
    """Write 50,000 + 10,000 random images in the files torchvision unpacks CIFAR-10 to."""
    folder = root / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        pixels = random.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        labels = (np.arange(10_000) % 10).tolist()  # as many of each class as in CIFAR-10
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    meta = {CIFAR10.meta["key"]: [f"class {i}" for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))


def find_photographs(folder: Path) -> ImageFiles:
    """Return the image files below a folder; the folder that a file is in is its class."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not paths:
        sys.exit(f"data: --images: no JPEG file in {folder}")
    classes = sorted({path.parent for path in paths})
    names = np.array([os.fsencode(path.relative_to(folder)) for path in paths])
    return ImageFiles(folder, names, torch.tensor([classes.index(path.parent) for path in paths]))


def streamed_side(files: ImageFiles, epochs: int) -> Side:
    """Return epochs of the framework's batches, without workers."""
    normalize = Normalization(IMAGENET_MEAN, IMAGENET_STD, image_size=224, device=torch.device("cpu"))
    reader = BatchReader(files, 224, augment=True, flip=True)
    batches = TrainBatches(StreamedImages(reader, normalize, batch_size=BATCH_SIZE, workers=0), BATCH_SIZE)

    def run() -> int:
        return sum(len(labels) for epoch in range(epochs) for _, labels in batches.epoch(epoch))

    return run


def image_folder_side(files: ImageFiles, epochs: int) -> Side:
    """Return epochs of the batches that people's scripts make, without workers."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    folder = Path(os.path.commonpath([(files.root / files.name(i)).parent.parent for i in range(len(files))]))
    loader: DataLoader[Any] = DataLoader(ImageFolder(folder, transform), batch_size=BATCH_SIZE, shuffle=True)

    def run() -> int:
        return sum(len(labels) for _ in range(epochs) for _, labels in loader)

    return run


def measure_data(network: str, device: torch.device, options: argparse.Namespace) -> list[Line]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with TemporaryDirectory() as unpacked:
        folder = options.images
        if folder.is_file():
            with tarfile.open(folder) as tar:
                # No file outside of it; Python before 3.11.4 has no filter.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # type: ignore[assignment]
                tar.extractall(unpacked)
            folder = Path(unpacked)
        files = find_photographs(folder)
        epochs = math.ceil(options.steps * BATCH_SIZE / len(files))
        sides = {"usual": image_folder_side(files, epochs), "streamed": streamed_side(files, epochs)}
        seconds = take_turns(sides, options.rounds, torch.device("cpu"))
    torch.set_num_threads(threads)
    lines = [
        Line("data", network, name, "images/s", [epochs * len(files) / value for value in values])
        for name, values in seconds.items()
    ]
    ratios = quotients(seconds["usual"], seconds["streamed"])
    lines.append(Line("data", network, "streamed / usual", "ratio", ratios, (">=", 1.3)))
    if device.type == "cuda":
        lines += cores_for_the_card(lines[1].values, card_rates(device, options.rounds))
    return lines


def cores_for_the_card(of_a_core: list[float], of_the_card: list[float]) -> list[Line]:
    """Return the rate at which a card trains ResNet-50, and how many cores read images as fast."""
    name = f"ResNet-50, batch {IMAGENET_BATCH}"
    cores = [rate / statistics.median(of_a_core) for rate in of_the_card]
    return [
        Line("data", "imagenet", f"{name}, on the card", "images/s", of_the_card),
        Line("data", "imagenet", "that feed it", "cores", cores),
    ]


def card_rates(device: torch.device, rounds: int, *, size: int = 224, steps: int = 20) -> list[float]:
    """Return images/s of training torchvision's ResNet-50 on images that are on the device already."""
    runtime = Runtime(device, precisions(device)[-1])
    model = runtime.place(torchvision.models.resnet50()).train()
    optimizer = build_optimizer(model.parameters(), SPEC, fused=device.type == "cuda")
    step = build_step(model, optimizer, TrainingHooks(), runtime=runtime)
    images = runtime.take(torch.randn(IMAGENET_BATCH, 3, size, size, device=device))
    labels = torch.arange(IMAGENET_BATCH, device=device)

    def run() -> None:
        for _ in range(steps):
            step(images, labels)

    with with_search():
        seconds = take_turns({"": run}, rounds, device)[""]
    return [steps * IMAGENET_BATCH / value for value in seconds]


# Prints when the first training step is done.
FIRST_STEP = """
import os
from rethink_prune.__main__ import main
from rethink_prune.training.step import PlainStep
real = PlainStep.__call__
def first(*arguments):
    real(*arguments)
    print("first step", flush=True)
    os._exit(0)
PlainStep.__call__ = first
main()
"""


def measure_startup(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    commands = {
        "--help": (["-m", "rethink_prune", "--help"], 3.0),
        "first step of the digits study": (["-c", FIRST_STEP, f"model={network}", f"device={device}"], 10.0),
    }
    for name, (arguments, limit) in commands.items():
        seconds = []
        for _ in range(min(options.rounds, 3)):
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
                seconds.append(time.perf_counter() - start)
        yield Line("startup", network, name, "s", seconds, ("<=", limit))


# What is measured, and the networks it is promised for.
PARTS: dict[str, tuple[Callable[[str, torch.device, argparse.Namespace], Iterable[Line]], list[str]]] = {
    "train": (measure_train, ["resnet20", "vgg16"]),
    "overhead": (measure_overhead, ["resnet20"]),
    "evaluate": (measure_evaluation, ["vgg16", "resnet56"]),
    "surgery": (measure_surgery, ["resnet110"]),
    "pruners": (measure_pruners, ["vgg16", "resnet56", "densenet40"]),
    "memory": (measure_memory, ["resnet20"]),
    "data": (measure_data, ["imagenet"]),  # the same for all networks
    "startup": (measure_startup, ["resnet20"]),
}

if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
