"""The benchmark script: what it prints and records, and that each side does the work it is timed for."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from rethink_prune import build_model, count_cost
from rethink_prune.training.runtime import Runtime, Speed

SCRIPT = Path(__file__).parents[1] / "scripts/benchmark.py"
CPU = torch.device("cpu")


def benchmark(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmark", module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


class Counting(nn.Module):
    """A network that counts what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)
        self.images = 0
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.training
        assert x.shape[1:] == (3, 32, 32)
        self.images += len(x)
        logits = self.fc(x.flatten(1))
        self.dtypes.add(logits.dtype)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("part", ["surgery", "overhead"])
def test_numbers_come_with_n_spread_and_versions(part: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = benchmark(part, "--networks=resnet20", "--rounds=2", "--steps=1", f"--json={file}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())

    machine = content["machine"]
    assert machine["python"] == platform.python_version()
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    for name in ("python", "torch", "torchvision", "threads", "cpu", "device"):
        assert f"{name} {machine[name]}" in done.stdout

    printed = [line for line in done.stdout.splitlines() if line.startswith(part)]
    for text, result in zip(printed, content["results"], strict=True):
        assert result["n"] == len(result["values"]) == 2
        assert result["median"] == median(result["values"])
        assert (result["min"], result["max"]) == (min(result["values"]), max(result["values"]))
        assert f"{result['median']:.3f} {result['unit']}" in text
        assert f"[{result['min']:.3f}, {result['max']:.3f}]  n=2" in text
        assert all(value > 0 for value in result["values"])
    asked = [result for result in content["results"] if result["limit"]]
    assert asked
    assert {result["unit"] for result in asked} == ({"s"} if part == "surgery" else {"%", "ratio"})
    for result in asked:
        assert result["limit"][0] == "<="
        assert result["reached"] == (result["median"] <= result["limit"][1])


@pytest.mark.parametrize(
    "side",
    [
        lambda script, model, split: script.usual_side(model, split, CPU, 0),
        lambda script, model, split: script.usual_side(model, split, CPU, 2),
        lambda script, model, split: script.framework_side(model, split, CPU, "fp32"),
        lambda script, model, split: script.bare_side(model, split, CPU, "fp32"),
    ],
    ids=["usual", "usual with workers", "framework", "bare"],
)
def test_every_round_of_a_side_trains_on_every_image(script: ModuleType, side: Callable[..., Any]) -> None:
    model, split = Counting(), script.random_images(3 * script.BATCH_SIZE)
    before = model.fc.weight.detach().clone()
    run = side(script, model, split)
    for round_number in (1, 2):
        run()
        assert model.images == round_number * len(split)
    assert model.dtypes == {torch.float32}
    assert not torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("recorded", [True, False])
def test_every_round_evaluates_every_image_and_leaves_the_network_alone(script: ModuleType, recorded: bool) -> None:
    model, split = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), script.random_images(300)
    before = model[1].weight.detach().clone()
    run = script.evaluation_side(model, split, CPU, "fp32", recorded)
    seen: list[int] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    first, second = run(), run()
    assert seen == 2 * [256, 44]
    assert first == second
    assert torch.equal(model[1].weight, before)


def test_a_pruner_that_does_not_exist_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "pruners", "--pruners=l1,l2"])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert "argument --pruners: l2: must be of l1, thinet" in capsys.readouterr().err


def test_both_sides_make_batches_of_every_photograph(script: ModuleType, tmp_path: Path) -> None:
    for i in range(5):
        folder = tmp_path / "photographs" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (i * 50, 0, 0)).save(folder / f"{i}.JPEG")
    files = script.find_photographs(tmp_path)
    assert files.labels.tolist() == [0, 0, 0, 1, 1]
    for side in (script.image_folder_side, script.streamed_side):
        assert side(files, 3)() == 15
    archive = tmp_path / "photographs.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "photographs", "photographs")
    options = argparse.Namespace(images=archive, rounds=2, steps=1)
    lines = script.measure_data("imagenet", CPU, options)
    assert [(line.what, line.unit, len(line.values)) for line in lines] == [
        ("usual", "images/s", 2),
        ("streamed", "images/s", 2),
        ("streamed / usual", "ratio", 2),
    ]
    assert lines[-1].limit == (">=", 1.3)


def test_the_cores_that_feed_a_card_are_its_rate_over_theirs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "IMAGENET_BATCH", 2)
    rates = script.card_rates(CPU, 2, size=32, steps=1)
    assert len(rates) == 2
    assert min(rates) > 0
    card, cores = script.cores_for_the_card([100.0, 250.0, 200.0], [3000.0, 3200.0])
    assert (card.values, card.unit) == ([3000.0, 3200.0], "images/s")
    assert (cores.values, cores.unit) == ([15.0, 16.0], "cores")


@pytest.mark.slow
def test_photographs_have_to_be_given(tmp_path: Path) -> None:
    done = benchmark("data", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "data: give photographs with --images FOLDER_OR_TAR\n"


def test_bf16_sides_compute_in_bf16(script: ModuleType) -> None:
    for make in (script.framework_side, script.bare_side):
        model = Counting()
        make(model, script.random_images(script.BATCH_SIZE), CPU, "bf16")()
        assert model.dtypes == {torch.bfloat16}


def test_sides_take_turns_and_the_warm_up_does_not_count(script: ModuleType) -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = script.take_turns(sides, 3, CPU)
    assert calls == [*"ba", *"ab", *"ba", *"ab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_loop_and_bare_steps_take_turns_step_by_step(script: ModuleType) -> None:
    calls: list[str] = []

    class Named(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(threading.current_thread().name)
            return super().forward(x)

    split = script.random_images(3 * script.BATCH_SIZE)
    sides = {"bare": script.bare_side(Named(), split, CPU, "fp32")}
    sides["loop"] = script.framework_side(Named(), split, CPU, "fp32")
    seconds = script.take_steps_in_turn(sides, 1)
    assert calls == ["loop", "bare"] * 3 + ["bare", "loop"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"bare": 1, "loop": 1}
    assert all(value > 0 for (value,) in seconds.values())


@pytest.mark.parametrize(
    ("limit", "reached"), [((">=", 2.0), True), ((">=", 2.1), False), (("<=", 1.9), False), (None, None)]
)
def test_a_limit_is_held_against_the_median(
    script: ModuleType, limit: tuple[str, float] | None, reached: bool | None
) -> None:
    line = script.Line("train", "vgg16", "fp32 / usual", "ratio", [9.0, 2.0, 1.0], limit)
    assert line.record()["reached"] is reached
    assert ("MISSED" in str(line)) == (reached is False)


def test_a_mistake_is_named_without_a_traceback(tmp_path: Path) -> None:
    done = benchmark("surgery", "--networks=resnet21", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("model.name=resnet21: no such network")


@pytest.fixture
def gpu() -> ModuleType:
    """Return what is measured on CUDA; a CPU can run all of it but streams."""
    return importlib.import_module("benchmark_gpu")


@pytest.mark.slow
def test_trainings_at_once_are_as_long_as_the_slowest_in_every_epoch(gpu: ModuleType) -> None:
    training = gpu.Training("resnet20", "cpu", "fp32", "auto", epochs=2, steps=1)
    seconds = gpu.run_together(training, 2)
    assert len(seconds) == 2, "the epoch before does not count"
    assert all(value > 0 for value in seconds)
    by_turns = gpu.run_together(dataclasses.replace(training, together=2), 1)
    assert len(by_turns) == 2
    assert all(value > 0 for value in by_turns)


@pytest.mark.slow
def test_a_training_that_fails_ends_the_benchmark(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"train: a process failed: Training\(network='resnet21'"):
        gpu.run_together(gpu.Training("resnet21", "cpu", "fp32", "auto", epochs=1, steps=1), 1)


def test_a_line_is_printed_and_written_before_the_next_is_measured(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    seen: list[tuple[int, int]] = []

    def measure(network: str, device: torch.device, options: argparse.Namespace) -> Iterator[Any]:
        printed = 0
        for number in range(3):
            printed += capsys.readouterr().out.count(f"{network} ")
            seen.append((printed, len(json.loads(file.read_text())["results"]) if number else 0))
            yield script.Line("train", network, "fp32", "images/s", [1.0 + number])

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # so that it is put back
    monkeypatch.setitem(script.PARTS, "train", (measure, ["vgg16"]))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--rounds=1", "--steps=1", f"--json={file}"])
    script.main()
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert [line["median"] for line in json.loads(file.read_text())["results"]] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], ["loop", "evaluation", "card"]), (["--lines=study,card"], ["study", "card"])],
)
def test_what_is_measured_on_a_gpu_can_be_chosen(
    arguments: list[str], expected: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", *arguments])
    assert script.parse_arguments().lines == expected
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--lines=all"])
    assert script.parse_arguments().lines == ["loop", *script.GPU_LINES]


def test_a_line_that_does_not_exist_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--lines=loop,speed"])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert "argument --lines: speed: must be of loop, evaluation, card" in capsys.readouterr().err


def test_short_trainings_are_timed_with_the_kernels_of_long_ones(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    choose = Runtime.choose

    def noticing(runtime: Runtime, steps: int) -> Speed:
        found.append(choose(dataclasses.replace(runtime, device=torch.device("cuda")), steps).searches)
        return choose(runtime, steps)

    monkeypatch.setattr(Runtime, "choose", noticing)
    script.framework_side(Counting(), script.random_images(script.BATCH_SIZE), CPU, "fp32")()
    assert found == [True]


def test_a_study_is_projected_from_both_of_its_networks(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_together(training: Any, count: int) -> list[float]:
        return [(0.5 if training.pruned else 1.0) * (1.5 if count > 1 else 1.0)] * training.epochs

    monkeypatch.setattr(gpu, "run_together", run_together)
    training = gpu.Training("vgg16", "cpu", "fp32", "auto", epochs=20, steps=1)
    one, many, ratio = gpu.measure_study(training, 5)
    assert one.values == [160 * 1.0 + (40 + 160 + 243) * 0.5] * 20
    assert many.values == [1.5 * value for value in one.values]
    assert ratio.values == [1.5] * 20
    assert [line.limit for line in (one, many, ratio)] == [None] * 3, "nothing is asked of a CPU"
    on_cuda = gpu.measure_study(gpu.Training("vgg16", "cuda", "fp32", "auto", epochs=20, steps=1), 5)
    assert [line.limit for line in on_cuda] == [("<=", 600.0), None, ("<=", 2.0)]


def test_too_few_epochs_project_nothing(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(gpu.measure_study(gpu.Training("vgg16", "cpu", "fp32", "auto", epochs=19, steps=1), 5)) == []
    assert capsys.readouterr().out == "study: not projected from fewer than 20 epochs\n"


def test_rates_of_the_card_are_work_over_time(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_timed", lambda side, rounds, device: (side(), [0.5] * rounds)[1])
    assert gpu.matmul_rate(CPU, size=8, rounds=2) == [2 * 8**3 / 0.5] * 2
    assert gpu.copy_rate(CPU, count=100, rounds=2) == [2 * 100 / 0.5] * 2


def test_every_rate_on_the_card_is_told_with_its_share(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_together(training: Any, count: int) -> list[float]:
        return [2.0 if training.deterministic else 1.0 * count] * training.epochs

    monkeypatch.setattr(gpu, "run_together", run_together)
    monkeypatch.setattr(gpu, "streams_side", lambda *arguments: lambda: None)
    monkeypatch.setattr(gpu, "matmul_rate", lambda device: [1e12, 2e12])
    monkeypatch.setattr(gpu, "copy_rate", lambda device: [1e9, 2e9])
    monkeypatch.setattr(gpu, "step_traffic", lambda *arguments: 64 * 1_000_000)
    options = argparse.Namespace(together=4, steps=10, rounds=3, epochs=1, lines=gpu.GPU_LINES)
    lines = {line.what: line for line in gpu.measure_gpu("resnet20", CPU, options)}
    precision = gpu.precisions(CPU)[-1] if len(gpu.precisions(CPU)) == 1 else "bf16"
    assert lines[f"{precision}, with evaluation"].values == [640.0] * 3
    assert lines[f"{precision}, 4 processes"].values == [640.0] * 3, "four times the images in four times the time"
    assert lines[f"{precision}, 4 by turns"].values == [4 * 640.0] * 3, "four times the images in the time of one"
    assert len(lines["making a batch"].values) == 3
    assert lines["deterministic / not, time"].values == [2.0] * 3
    flops = build_model_flops("resnet20")
    assert lines["of the matmul rate"].values == pytest.approx([100 * 640 * flops / 2e12] * 3)
    assert lines["of the bandwidth, if unfused"].values == pytest.approx([100 * 640e6 / 2e9] * 3)
    assert not any("study" in what for what in lines), "only vgg16's is projected"
    options.lines = ["loop", "deterministic"]
    asked = [line.what for line in gpu.measure_gpu("resnet20", CPU, options)]
    assert asked == [f"{precision}, with evaluation", "deterministic / not, time"]
    options.lines = ["loop", "study"]
    assert list(gpu.measure_gpu("resnet20", CPU, options)) == []


def build_model_flops(network: str) -> int:
    """Return the training FLOPs of an image, by the stated convention."""
    return 6 * count_cost(build_model(network), (3, 32, 32)).macs


def test_traffic_is_what_operations_take_and_give_and_views_are_free(gpu: ModuleType) -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(3, 8)
    with gpu._Traffic() as traffic:
        x.view(8, 4)
        x @ weight.t()
    assert traffic.bytes == 4 * (4 * 8 + 3 * 8 + 4 * 3)
    with gpu._Traffic() as traffic:
        x.add_(1)
    assert traffic.bytes == 4 * 2 * (4 * 8), "read and written"
    step = gpu.step_traffic(Counting(), CPU, "fp32")
    assert step > 4 * 64 * 3 * 32 * 32, "the batch is read"


@pytest.mark.slow
def test_start_up_is_measured_against_what_is_asked(tmp_path: Path) -> None:
    done = benchmark("startup", "--rounds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    help_line, first_step = [line for line in done.stdout.splitlines() if line.startswith("startup")]
    assert "--help" in help_line
    assert "asked <= 3" in help_line
    assert "first step of the digits study" in first_step
    assert "asked <= 10" in first_step


@pytest.mark.slow
def test_a_cpu_says_that_it_projects_no_study(tmp_path: Path) -> None:
    done = benchmark("train", "--networks=resnet20", "--rounds=1", "--steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a whole study is not projected without a GPU" in done.stdout
    assert "L1 study" not in done.stdout
