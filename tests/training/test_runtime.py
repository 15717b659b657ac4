"""Devices and arithmetic as configured, or as the hardware allows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from rethink_prune.errors import UserError
from rethink_prune.training.runtime import Runtime, prepare_device, resolve_device, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False, "avx2": True}, "fp32")],
)
def test_auto_takes_bf16_only_where_the_processor_has_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16", "what is asked for is done"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_changes_activations_and_not_weights(precision: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with Runtime(CPU, precision).autocast():
        assert layer(torch.zeros(1, 4)).dtype is dtype
    assert layer.weight.dtype is torch.float32


def test_a_device_that_is_not_there() -> None:
    assert resolve_device("cpu") == CPU
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"device=cuda:{count}: no such CUDA device; this machine has {count}"):
        resolve_device(f"cuda:{count}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_the_gpu() -> None:
    assert resolve_device("auto").type == "cuda"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Put back what belongs to the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back, too
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


def test_deterministic_is_set_before_cuda_starts_and_taken_back_by_the_next_study(settings: pytest.MonkeyPatch) -> None:
    settings.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare_device(torch.device("cuda"), deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    prepare_device(CPU, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (True, False)


@pytest.mark.usefixtures("settings")
def test_a_cpu_needs_no_work_space() -> None:
    prepare_device(CPU, deterministic=True)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "CUDA has started without CUBLAS_WORKSPACE_CONFIG"), (":0:0", "CUBLAS_WORKSPACE_CONFIG is :0:0")],
)
def test_deterministic_that_comes_too_late_says_what_to_set(
    value: str | None, found: str, settings: pytest.MonkeyPatch
) -> None:
    settings.setattr(torch.cuda, "is_initialized", lambda: True)
    if value:
        settings.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    message = f"deterministic=true: {found}; start again with CUBLAS_WORKSPACE_CONFIG=:4096:8 set"
    with pytest.raises(UserError, match=f"^{message}$"):
        prepare_device(torch.device("cuda"), deterministic=True)
    settings.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_device(torch.device("cuda"), deterministic=True)
