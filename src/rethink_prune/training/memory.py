"""The most memory that was in use."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start to watch for a new peak; that of a process, which stands for the CPU's, cannot start anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the greatest number of bytes in use.

    On CUDA, what tensors took of the device since `reset_peak_memory`. On a CPU, what the whole process, Python and its
    libraries included, had resident at any time since it was started; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which can be that of the process that started this one.
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
