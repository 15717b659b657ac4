"""The configuration that commands read, and what is wrong with a command where Hydra's answer would be a riddle."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rethink_prune.errors import UserError

# launcher=...: the package with Hydra's plugin, and the extra of this package that brings it.
_PLUGINS = {
    "local": ("hydra-joblib-launcher", "launchers"),
    "slurm": ("hydra-submitit-launcher", "launchers"),
    "ray": ("hydra-ray-launcher", "ray"),
}
_PRINTING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}


def check_arguments(arguments: Sequence[str], conf: Path) -> None:
    """Check a command's arguments against the groups in the folder `conf` and the launchers that are installed.

    Raises
    ------
    UserError
        If nothing is chosen from a group, or a launcher that is not there.
    """
    for argument in arguments:
        group, separator, choice = argument.partition("=")
        if separator and group and choice == "null" and (conf / group).is_dir():
            choices = ", ".join(_choices(conf / group))
            raise UserError(f"{argument}: must be one of {choices}; leave it out for the default")
        if group == "launcher" and choice in _PLUGINS:
            package, extra = _PLUGINS[choice]
            try:
                version(package)
            except PackageNotFoundError:
                raise UserError(
                    f'{argument}: needs {package}; install it with pip install "rethink-prune[{extra}]"'
                ) from None
            if choice == "slurm" and shutil.which("srun") is None:
                raise UserError(f"{argument}: there is no srun here; start it on a machine of the Slurm cluster")


def end_quietly_unread(arguments: Sequence[str]) -> None:
    """Let a command that only prints end without an error when nobody reads on, as in ``--help | head``."""
    if not _PRINTING.isdisjoint(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _choices(group: Path) -> list[str]:
    return sorted(file.stem for file in group.glob("*.yaml"))
