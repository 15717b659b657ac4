"""How much memory this process can still take, and whether images and batches fit in it."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from rethink_prune.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = (
    "set dataset.workers=0 or to fewer, or enlarge it "
    "(mount -o remount,size=8g /dev/shm; for a container, --shm-size=8g)"
)
_GIB, _MIB = 2**30, 2**20


def check_memory(images: int, *, image_size: int, channels: int) -> None:
    """Raise `UserError` if decoded images (uint8) do not fit in memory.

    Examples
    --------
    >>> check_memory(10, image_size=32, channels=3)
    """
    available = available_memory()
    needed = images * image_size**2 * channels
    if available is not None and needed > available:
        raise UserError(
            f"dataset: {images} images of {image_size} x {image_size} x {channels} need {needed / _GIB:.2f} "
            f"GiB of memory, {available / _GIB:.2f} GiB are available; set a smaller dataset.image_size or "
            "dataset.train_limit"
        )


def check_shared_memory(workers: int, needed: int) -> None:
    """Raise `UserError` if `workers` processes would have more bytes on their way than shared memory has left.

    Examples
    --------
    >>> check_shared_memory(workers=2, needed=0)
    """
    if not SHARED_MEMORY.exists():  # not Linux
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"dataset.workers={workers}: batches on their way from the workers need {needed / _MIB:.0f} MiB of "
            f"{SHARED_MEMORY}, which has {free / _MIB:.0f} MiB left; {MORE_SHARED_MEMORY}"
        )


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes a process can still use without swapping, or None where the system does not say.

    On Linux the least of what the machine has available and what the process's control groups (version 2: a
    batch system's or a container's limit) leave; elsewhere the free physical memory, if known.

    Parameters
    ----------
    proc, cgroups : Path
        Where those file systems are mounted.

    Examples
    --------
    >>> (available_memory() or 1) > 0
    True
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    # MemFree is less: it leaves out the caches of files, which give way.
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
    # A limit of a group holds for all groups inside it.
    while group.is_relative_to(cgroups):
        with suppress(OSError, ValueError):  # the root group has no such files, and "max" is no limit
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(limit - used + int(stat["inactive_file"]))
        group = group.parent
    return left
