"""How much memory this process can still take."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes a process can still use without swapping, or None where the system does not say.

    On Linux the least of what the machine has available and what the process's control groups (version 2: a
    batch system's or a container's limit) leave; elsewhere the free physical memory, if known.

    Parameters
    ----------
    proc, cgroups : Path
        Where those file systems are mounted.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    meminfo = dict(line.split(":", 1) for line in lines if ":" in line)
    machine = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([machine, *_left_in_groups(proc, cgroups)])


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """Return what each control group around this process leaves, in bytes, for those that have a limit."""
    left: list[int] = []
    try:
        own = next(line for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return left
    group = cgroups / own.removeprefix("0::/")
    while group.is_relative_to(cgroups):
        try:
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(limit - used + int(stat["inactive_file"]))  # file caches give way
        except (OSError, ValueError):  # the root group has no such files, and "max" is no limit
            pass
        group = group.parent
    return left
