"""Which device a study runs on, and in which precision."""

from __future__ import annotations

import logging
import os
import platform

import torch

from rethink_prune.errors import UserError
from rethink_prune.training.distributed import ALONE, Processes

log = logging.getLogger(__name__)

# The sizes of work space with which cuBLAS sums in the same order every time.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that is there.

    Processes that train together take one CUDA device each, by their numbers on the machine.

    Raises
    ------
    UserError
        If a CUDA device is named and there is none of that number, or fewer devices than processes.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if processes.world > 1 and count > 0:
        return _device_of(processes, name, count)
    device = torch.device("cuda" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device={name}: no such CUDA device; this machine has {count}; use device=auto or device=cpu")
    return device


def _device_of(processes: Processes, name: str, devices: int) -> torch.device:
    started = f"torchrun started {processes.local_world} processes on this machine"
    if ":" in name and processes.local_world > 1:
        raise UserError(f"device={name}: {started}, each of which needs a device of its own; use device=auto")
    if processes.local_world > devices:
        raise UserError(f"device={name}: {started}, which has {devices} CUDA devices; use --nproc-per-node={devices}")
    return torch.device(name if ":" in name else f"cuda:{processes.local_rank}")


def describe_device(device: torch.device) -> str:
    """Return the name of a device and, of a CPU, the number of threads.

    Examples
    --------
    >>> describe_device(torch.device("cpu")).startswith("CPU (")
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def resolve_precision(name: str, device: torch.device) -> str:
    """Turn ``auto`` into ``bf16`` where the hardware computes in bfloat16, else ``fp32``.

    Examples
    --------
    >>> resolve_precision("bf16", torch.device("cpu"))
    'bf16'
    """
    if name != "auto":
        return name
    # Look for the instructions, not for whether torch can run the type: emulated bfloat16 is slower than float32.
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return "bf16" if has_bf16 else "fp32"


def prepare_device(device: torch.device, *, deterministic: bool) -> None:
    """Set what PyTorch keeps for the whole process: the current device, and whether only deterministic kernels run.

    Raises
    ------
    UserError
        If CUDA has started already in a way that is not deterministic.

    Examples
    --------
    >>> prepare_device(torch.device("cpu"), deterministic=False)
    """
    if device.type == "cuda" and deterministic:
        _make_cublas_deterministic()
        log.info("deterministic=true: CUDA takes slower kernels; scripts/benchmark.py train measures what that costs")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    # cuDNN times its kernels and takes the fastest, which may be another one in the next run.
    torch.backends.cudnn.benchmark = not deterministic


def _make_cublas_deterministic() -> None:
    # cuBLAS reads the variable once, when CUDA starts: setting it later changes nothing.
    value = os.environ.get(_CUBLAS)
    if value is None and not torch.cuda.is_initialized():
        value = os.environ[_CUBLAS] = _DETERMINISTIC_CUBLAS[0]
    if value not in _DETERMINISTIC_CUBLAS:
        found = f"{_CUBLAS} is {value}" if value else f"CUDA has started without {_CUBLAS}"
        raise UserError(f"deterministic=true: {found}; start again with {_CUBLAS}={_DETERMINISTIC_CUBLAS[0]} set")
