"""Devices and arithmetic as configured, or as the hardware allows."""

from __future__ import annotations

import pytest
import torch

from rethink_prune.errors import UserError
from rethink_prune.training.precision import autocast, resolve_device, resolve_precision

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
    with autocast(CPU, precision):
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
