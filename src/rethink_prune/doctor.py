"""``python -m rethink_prune.doctor``: what this machine has, and whether the default study can run on it."""

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement

from rethink_prune.errors import UserError, first_line
from rethink_prune.store.metrics import read_metrics, steady_pace
from rethink_prune.store.store import Store
from rethink_prune.text import duration, size

PACKAGE = "rethink-prune"
_SHOWN = (PACKAGE, "torch", "torchvision", "numpy", "hydra-core")
# Epochs of each network that is timed.
_EPOCHS = 3


def main(arguments: list[str] | None = None) -> int:
    """Print what is found; returns 0 if the default study can run, 1 otherwise."""
    start = time.monotonic()
    description = "Say what this machine has, whether the default study can run, and about how long it will take."
    argparse.ArgumentParser(prog="rethink-prune-doctor", description=description).parse_args(arguments)
    try:
        for name, text in _findings(start):
            print(f"{name:<13} {text}", flush=True)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever a broken installation raises is a reason
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        print(f"The default study cannot run here: {reason}", file=sys.stderr)
        return 1
    print("The default study can run here: python -m rethink_prune")
    return 0


def _findings(start: float) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in _SHOWN)])
    present, missing = find_extras()
    yield "extras", ", ".join(present) or "none"
    if missing:
        yield "", f'missing: {", ".join(missing)}; install them with pip install "{PACKAGE}[{",".join(missing)}]"'
    # Imported here: --help needs no torch, and what fails to import is a reason to tell.
    import torch

    from rethink_prune.study.compose import Study
    from rethink_prune.training.runtime import describe_device, prepare_runtime

    config = Study().config
    runtime = prepare_runtime(config.device, config.precision)
    yield "device", f"{describe_device(runtime.device)}; precision=auto takes {runtime.precision}"
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runtime.device)
        yield "", f"{size(total)} of memory, {size(free)} free"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{cores}, load {os.getloadavg()[0]:.1f}; PyTorch takes {torch.get_num_threads()} threads"
    yield "memory", size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    store = Store(Path(config.store.root))
    with _beside(store) as folder:
        yield "disk", f"{size(shutil.disk_usage(folder).free)} free"
        seconds = _estimate(folder, start)
        yield "store", f"{store.root}: works"
    yield "default study", f"about {duration(seconds)}: an estimate from {_EPOCHS} epochs of either network"


def find_extras() -> tuple[list[str], list[str]]:
    """Return the optional extras whose packages are all here, and those that miss some.

    Examples
    --------
    >>> present, missing = find_extras()
    >>> "onnx" in present + missing, "dev" in present + missing
    (True, False)
    """
    names = [name for name in metadata(PACKAGE).get_all("Provides-Extra") or [] if name != "dev"]
    needed = [Requirement(text) for text in requires(PACKAGE) or []]
    missing = {
        name
        for name in names
        for requirement in needed
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": name})
        and not _is_installed(requirement)
    }
    return [name for name in names if name not in missing], sorted(missing)


def _is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


@contextmanager
def _beside(store: Store) -> Iterator[Path]:
    """Yield a folder on the disk of a store, which is gone afterwards; raise `UserError` if the store cannot work."""
    store.check()
    if (store.root / "stages").is_dir():
        store.prepare()
    home = next(folder for folder in (store.root, *store.root.parents) if folder.is_dir())
    try:
        place = TemporaryDirectory(dir=home, prefix=".rethink-prune-doctor-")
    except OSError as error:
        advice = "name a folder you can write with store.root=... or RETHINK_PRUNE_STORE"
        raise UserError(f"store.root={store.root}: cannot be written ({error.strerror}); {advice}") from error
    with place as folder:
        yield Path(folder)


def _estimate(folder: Path, start: float) -> float:
    """Run the default study for a few epochs in `folder`, and return the seconds that all of it will take.

    Parameters
    ----------
    folder : Path
        Gets a store and a run.
    start : float
        When this process was started: importing the libraries counts.
    """
    from rethink_prune.study.compose import Study
    from rethink_prune.study.run import run_study

    place = {"store.root": folder / "store"}
    plan = Study(place).plan()
    short = Study({**place, "recipe.epochs": _EPOCHS, "recipe.finetune.epochs": _EPOCHS, "arms": ["finetune"]})
    with redirect_stdout(io.StringIO()):
        summary = run_study(short, folder / "run")
    large, pruned = summary["large"], summary["arms"]["finetune"]
    other = time.monotonic() - start - large["seconds"] - pruned["seconds"]
    arms = sum(_training_seconds(pruned, arm["epochs"]) for arm in plan["arms"].values())
    return other + _training_seconds(large, plan["large"]["epochs"]) + arms


def _training_seconds(entry: Mapping[str, Any], epochs: int) -> float:
    rows = read_metrics(Path(entry["stage"]))
    pace = steady_pace(rows)
    assert pace is not None
    return rows[0]["seconds"] + (epochs - 1) * pace


if __name__ == "__main__":
    sys.exit(main())
