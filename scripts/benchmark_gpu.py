"""What ``benchmark.py train`` measures on CUDA alone; as a script, one of the trainings that it runs side by side.

Trainings are processes of their own. Each does one epoch that does not count (CUDA starts, steps are recorded or
compiled), says so, and waits until all are there; epochs then include the evaluation of a fifth as many images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmark_sides import (
    BATCH_SIZE,
    MEAN,
    SPEC,
    STD,
    Line,
    Side,
    batches_of,
    precisions,
    quotients,
    random_images,
    take_turns,
    with_search,
)
from rethink_prune import build_model, count_cost, prune
from rethink_prune.data import EvalBatches, ImageArray
from rethink_prune.data.device_images import DeviceImages
from rethink_prune.data.normalization import Normalization
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.hooks import TrainingHooks
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.progress import Row
from rethink_prune.training.runtime import Runtime, prepare_runtime
from rethink_prune.training.schedule import build_optimizer
from rethink_prune.training.step import build_step
from rethink_prune.training.together import train_together
from rethink_prune.training.train import train

# The study that is projected: the epochs of `large`, and of `finetune`, `scratch_e` and `scratch_b` together.
LARGE_EPOCHS, PRUNED_EPOCHS = 160, 40 + 160 + 243
LEAST_EPOCHS = 20  # from fewer, nothing is projected
# What is measured on CUDA, beside the training loop; see benchmark.py.
GPU_LINES = ("evaluation", "card", "batches", "compile", "processes", "streams", "together", "deterministic", "study")


@dataclass(frozen=True)
class Training:
    """Trainings of random images in a process, which take turns; with `pruned`, of VGG-16-A instead of VGG-16."""

    network: str
    device: str
    precision: str
    accelerate: str
    epochs: int
    steps: int
    pruned: bool = False
    deterministic: bool = False
    together: int = 1


def measure_gpu(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Line]:
    """Yield what `benchmark.py` adds for a network on CUDA, as far as `options.lines` asks for it."""
    asked = set(options.lines)
    precision = "bf16" if "bf16" in precisions(device) else "fp32"
    count, images = options.together, options.steps * BATCH_SIZE
    fast = Training(network, str(device), precision, "auto", options.rounds, options.steps)

    def line(what: str, unit: str, values: list[float]) -> Line:
        return Line("train", network, what, unit, values)

    def rates(seconds: list[float], trainings: int = 1) -> list[float]:
        return [trainings * images / value for value in seconds]

    # Shares of the card and the price of deterministic kernels are told against it.
    if asked & {"evaluation", "card", "deterministic"}:
        one = run_together(fast, 1)
        yield line(f"{precision}, with evaluation", "images/s", rates(one))
    if "card" in asked:
        for what, unit, values in card_shares(network, device, precision, rates(one)):
            yield line(what, unit, values)
    if "batches" in asked:
        made = take_turns({"": batches_side(options.steps, device)}, options.rounds, device)[""]
        yield line("making a batch", "us", [1e6 * value / options.steps for value in made])
    if "compile" in asked:
        compiled = run_together(replace(fast, accelerate="compile"), 1)
        yield line(f"{precision}, compile, the same", "images/s", rates(compiled))
    if "processes" in asked:
        yield line(f"{precision}, {count} processes", "images/s", rates(run_together(fast, count), count))
    if "streams" in asked:
        sides = {"": streams_side(network, count, options.steps, device, precision)}
        streams = take_turns(sides, options.rounds, device)[""]
        yield line(f"{precision}, {count} streams", "images/s", rates(streams, count))
    if "together" in asked:
        several = replace(fast, together=count)
        yield line(f"{precision}, {count} by turns", "images/s", rates(run_together(several, 1), count))
        compiled = run_together(replace(several, accelerate="compile"), 1)
        yield line(f"{precision}, {count} by turns, compile", "images/s", rates(compiled, count))
    if "deterministic" in asked:
        deterministic = run_together(replace(fast, deterministic=True), 1)
        yield line("deterministic / not, time", "ratio", quotients(deterministic, one))
    if "study" in asked and network == "vgg16":
        yield from measure_study(replace(fast, epochs=options.epochs), count)


def card_shares(
    network: str, device: torch.device, precision: str, rates: list[float]
) -> Iterator[tuple[str, str, list[float]]]:
    """Yield name, unit and values of the card's own rates, and the shares of them that so many images/s use."""
    flops, bandwidth = matmul_rate(device), copy_rate(device)
    yield "bf16 matmul of the card", "TFLOP/s", [value / 1e12 for value in flops]
    yield "copy of the card", "GB/s", [value / 1e9 for value in bandwidth]
    model = build_model(network)
    per_image = count_cost(model, (3, 32, 32)).train_flops(1)
    yield "of the matmul rate", "%", [100 * per_image * value / max(flops) for value in rates]
    moved = step_traffic(model, device, precision) / BATCH_SIZE
    yield "of the bandwidth, if unfused", "%", [100 * moved * value / max(bandwidth) for value in rates]


def measure_study(large: Training, count: int) -> Iterator[Line]:
    """Yield how long the L1-norm study of VGG-16 would take, alone and `count` at once."""
    if large.epochs < LEAST_EPOCHS:
        print(f"study: not projected from fewer than {LEAST_EPOCHS} epochs")
        return

    def study(trainings: int) -> list[float]:
        seconds = (run_together(training, trainings) for training in (large, replace(large, pruned=True)))
        return [LARGE_EPOCHS * a + PRUNED_EPOCHS * b for a, b in zip(*seconds, strict=True)]

    limits: dict[str, tuple[str, float]] = {}
    if torch.device(large.device).type == "cuda":
        limits = {"one": ("<=", 600.0), "many": ("<=", 2.0)}
    one = study(1)
    yield Line("train", large.network, "L1 study, projected", "s", one, limits.get("one"))
    many = study(count)
    yield Line("train", large.network, f"{count} seeds at once, projected", "s", many)
    ratios = quotients(many, one)
    yield Line("train", large.network, f"{count} seeds / one, time", "ratio", ratios, limits.get("many"))


def run_together(training: Training, count: int) -> list[float]:
    """Return, for every epoch, the seconds of the slowest of `count` such trainings at once."""
    scripts = str(Path(__file__).parent)
    path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, json.dumps(asdict(training))]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                sys.exit(f"train: a process failed: {training}")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        seconds = [json.loads(process.communicate()[0] or "null") for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    if None in seconds:
        sys.exit(f"train: a process failed: {training}")
    return [max(epoch) for epoch in zip(*seconds, strict=True)]


def work(training: Training) -> None:
    """Train; print ``ready``, wait for a line, print the seconds of every further epoch: the slowest training's."""
    runtime = prepare_runtime(training.device, training.precision, deterministic=training.deterministic)
    device = runtime.device
    normalize = Normalization(MEAN, STD, image_size=32, device=device)
    ends: list[list[float]] = [[] for _ in range(training.together)]
    waiting = set(range(training.together))

    def on_epoch(number: int, rows: list[Row]) -> None:
        waiting.discard(number)
        if len(rows) == 1 and not waiting:
            print("ready", flush=True)
            sys.stdin.readline()
        ends[number].append(time.perf_counter())  # an evaluation has just waited for the device

    def train_one(number: int, folder: Path) -> None:
        model = build_model(training.network)
        if training.pruned:
            model = prune(model, "l1", example=torch.zeros(1, 3, 32, 32), variant="A").model
        train(
            model,
            batches_of(random_images(training.steps * BATCH_SIZE), device),
            {"test": EvalBatches(DeviceImages(_test_images(training), normalize), batch_size=256)},
            replace(SPEC, epochs=1 + training.epochs),
            runtime=replace(runtime, accelerate=training.accelerate),
            hooks=TrainingHooks(),
            seed=0,
            checkpoints=Checkpoints(folder),
            interrupts=Interrupts(),
            on_epoch=partial(on_epoch, number),
        )

    with TemporaryDirectory() as parent, with_search():
        folders = [Path(parent) / str(number) for number in range(training.together)]
        for folder in folders:
            folder.mkdir()
        trainings = [partial(train_one, number, folder) for number, folder in enumerate(folders)]
        train_together(trainings, at_once=training.together, device=device)
    seconds = [[after - before for before, after in pairwise(own)] for own in ends]
    print(json.dumps([max(epoch) for epoch in zip(*seconds, strict=True)]))


def _test_images(training: Training) -> ImageArray:
    return random_images(max(1, training.steps * BATCH_SIZE // 5))


def batches_side(steps: int, device: torch.device) -> Side:
    """Return an epoch of batches, augmented on the device, that nobody trains on."""
    batches = batches_of(random_images(steps * BATCH_SIZE), device)

    def run() -> int:
        return sum(1 for _ in batches.epoch(0))

    return run


def streams_side(network: str, count: int, steps: int, device: torch.device, precision: str) -> Side:
    """Return an epoch of `count` trainings in this process, each on a CUDA stream of its own."""
    runtime = Runtime(device, precision)
    batches = batches_of(random_images(steps * BATCH_SIZE), device)
    streams = [torch.cuda.Stream(device) for _ in range(count)]
    trained: list[Callable[..., Any]] = []
    for _ in streams:
        model = runtime.place(build_model(network)).train()
        optimizer = build_optimizer(model.parameters(), SPEC, fused=True)
        trained.append(build_step(model, optimizer, TrainingHooks(), runtime=runtime))

    def run() -> None:
        torch.cuda.synchronize(device)
        epochs = [batches.epoch(0) for _ in streams]
        for _ in range(steps):
            for stream, step, epoch in zip(streams, trained, epochs, strict=True):
                with torch.cuda.stream(stream):
                    step(*next(epoch))

    return run


def matmul_rate(device: torch.device, *, size: int = 8192, rounds: int = 5) -> list[float]:
    """Return the FLOP/s of a product of two square bfloat16 matrices, for each round."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return [2 * size**3 / seconds for seconds in _timed(lambda: a @ b, rounds, device)]


def copy_rate(device: torch.device, *, count: int = 1 << 30, rounds: int = 5) -> list[float]:
    """Return the bytes read and written per second by a copy of `count` bytes, for each round."""
    source = torch.zeros(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return [2 * count / seconds for seconds in _timed(lambda: target.copy_(source), rounds, device)]


def _timed(side: Side, rounds: int, device: torch.device, *, repeats: int = 10) -> list[float]:
    def repeated() -> None:
        for _ in range(repeats):  # so that the launch and the wait do not count
            side()

    return [seconds / repeats for seconds in take_turns({"": repeated}, rounds, device)[""]]


def step_traffic(model: nn.Module, device: torch.device, precision: str) -> int:
    """Return the bytes that the operations of one training step of a full batch read and write, each by itself."""
    model = Runtime(device, precision).place(model).train()
    optimizer = build_optimizer(model.parameters(), SPEC, fused=device.type == "cuda")
    # Not recorded: a replay calls no operation whose tensors could be counted.
    step = build_step(model, optimizer, TrainingHooks(), runtime=Runtime(device, precision, "off"))
    images, labels = next(batches_of(random_images(BATCH_SIZE), device).epoch(0))
    step(images, labels)  # makes the optimiser's state
    with _Traffic() as traffic:
        step(images, labels)
    return traffic.bytes


class _Traffic(TorchDispatchMode):
    """Adds up the sizes of what operations take and give; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        taken = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        is_view = not func._schema.is_mutable and any(t.untyped_storage().data_ptr() in storages for t in taken)
        if not is_view:
            self.bytes += sum(tensor.nbytes for tensor in given + taken)
        return outputs


if __name__ == "__main__":
    work(Training(**json.loads(sys.argv[1])))
