"""Measure how much memory a training takes."""

import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, on CUDA; the peak of a process, which is that of a CPU, cannot be reset.

    Examples
    --------
    >>> reset_peak_memory(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the greatest number of bytes that were in use; None where the system does not say.

    On CUDA, what tensors took of the device since `reset_peak_memory`. On a CPU, what the whole process, Python and its
    libraries included, had resident at any time since it was started.

    Examples
    --------
    >>> peak_memory(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux can be the peak of the process that started this one.
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else None
    if sys.platform == "darwin":
        # Imported here because Windows has no such module.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
