"""Devices and arithmetic as configured, or as the hardware allows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rethink_prune.errors import UserError
from rethink_prune.training.runtime import COMPILE_STEPS, SEARCH_STEPS, Runtime, Speed, prepare_runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False, "avx2": True}, "fp32")],
)
def test_auto_takes_bf16_only_where_the_processor_has_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert prepare_runtime("cpu", "auto").precision == expected
    assert prepare_runtime("cpu", "fp32").precision == "fp32"
    assert prepare_runtime("cpu", "bf16").precision == "bf16", "what is asked for is done"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_changes_activations_and_not_weights(precision: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with Runtime(CPU, precision).autocast():
        assert layer(torch.zeros(1, 4)).dtype is dtype
    assert layer.weight.dtype is torch.float32


def test_a_device_that_is_not_there() -> None:
    assert prepare_runtime("cpu").device == CPU
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"device=cuda:{count}: no such CUDA device; this machine has {count}"):
        prepare_runtime(f"cuda:{count}")


@pytest.mark.cuda
def test_auto_takes_the_gpu() -> None:
    assert prepare_runtime("auto").device.type == "cuda"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Put back what belongs to the whole process; CUDA seems to be there, and to start with the first question."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back, too
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flag, started = torch.backends.cudnn.deterministic, []

    def starting(answer: object) -> Callable[..., object]:
        return lambda *arguments, **options: (started.append(True), answer)[1]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(started))
    for name, answer in (("is_available", True), ("device_count", 1), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, starting(answer))
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = flag


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_deterministic_is_set_before_cuda_starts_and_taken_back_by_the_next_study(device: str) -> None:
    runtime = prepare_runtime(device, deterministic=True)
    assert (runtime.device.type, runtime.precision, runtime.deterministic) == ("cuda", "bf16", True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not prepare_runtime("cpu").deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    prepare_runtime(device, deterministic=True)


@pytest.mark.usefixtures("settings")
def test_a_cpu_needs_no_work_space() -> None:
    prepare_runtime("cpu", deterministic=True)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "CUDA has started without CUBLAS_WORKSPACE_CONFIG"), (":0:0", "CUBLAS_WORKSPACE_CONFIG is :0:0")],
)
def test_deterministic_that_comes_too_late_says_what_to_set(
    value: str | None, found: str, settings: pytest.MonkeyPatch
) -> None:
    if value:
        settings.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    prepare_runtime("cuda")
    message = f"deterministic=true: {found}; start again with CUBLAS_WORKSPACE_CONFIG=:4096:8 set"
    with pytest.raises(UserError, match=f"^{message}$"):
        prepare_runtime("cuda", deterministic=True)
    settings.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_runtime("cuda", deterministic=True)


# Makes a plan; functions of torch.cuda that ask for a device say what is set by then.
STARTING = """
import os, sys, torch
def starting(name, answer):
    def start(*arguments, **options):
        print(name, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), file=sys.stderr)
        return answer
    return start
answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
for name in [*answers, "_lazy_init", "init", "set_device", "get_device_properties", "get_device_name"]:
    setattr(torch.cuda, name, starting(name, answers.get(name)))
from rethink_prune.__main__ import main
main()
"""


def test_a_whole_study_sets_deterministic_before_it_asks_for_the_device(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING, "deterministic=true", "dry_run=true"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked = [line.split() for line in done.stderr.splitlines()]
    assert {"is_available", "is_bf16_supported"} <= {name for name, *_ in asked}
    assert {setting for _, setting in asked} == {":4096:8"}


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (SEARCH_STEPS, {}, Speed(compiles=False, searches=False)),
        (SEARCH_STEPS + 1, {}, Speed(compiles=False, searches=True)),
        (COMPILE_STEPS + 1, {}, Speed(compiles=True, searches=True)),
        (COMPILE_STEPS + 1, {"accelerate": "off"}, Speed(compiles=False, searches=True)),
        (COMPILE_STEPS + 1, {"deterministic": True}, Speed(compiles=False, searches=False)),
        (COMPILE_STEPS + 1, {"device": torch.device("cpu")}, Speed(compiles=False, searches=False)),
        (1, {"accelerate": "compile"}, Speed(compiles=True, searches=False)),
    ],
)
def test_what_takes_time_at_first_is_for_trainings_that_are_long_enough(
    steps: int, options: dict[str, Any], expected: Speed
) -> None:
    assert replace(Runtime(torch.device("cuda"), "bf16"), **options).choose(steps) == expected
