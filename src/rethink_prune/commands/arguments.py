"""Check a command's arguments where Hydra's own message would not say what to do."""

import re
import shutil
import signal
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.files import check_folder

# launcher=...: the package with Hydra's plugin, and the extra of this package that brings it.
_PLUGINS = {
    "local": ("hydra-joblib-launcher", "launchers"),
    "slurm": ("hydra-submitit-launcher", "launchers"),
    "ray": ("hydra-ray-launcher", "ray"),
}
_PRINTING_OPTIONS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}


def check_arguments(arguments: Sequence[str], conf: Path) -> None:
    """Check a command's arguments against the groups in the folder `conf` and the launchers that are installed.

    Raises
    ------
    UserError
        If nothing is chosen from a group, a launcher that is not there, or a file as the folder of a run.

    Examples
    --------
    >>> from rethink_prune.files import conf_dir
    >>> check_arguments(["budget=null"], Path(conf_dir()))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    rethink_prune.errors.UserError: budget=null: must be one of capped, paper, ...
    """
    for argument in arguments:
        group, separator, choice = argument.partition("=")
        if separator and not group:
            raise UserError(f"{argument}: there is no key before the =")
        if group in ("hydra.run.dir", "hydra.sweep.dir"):
            check_folder(Path(choice), argument)
        # Hydra takes these for a value; of a word that is no choice it says so.
        if separator and re.fullmatch(r"null|true|false|[\d.]*", choice) and (conf / group).is_dir():
            choices = ", ".join(sorted(file.stem for file in (conf / group).glob("*.yaml")))
            raise UserError(f"{argument}: must be one of {choices}; leave it out for the default")
        if group == "launcher" and choice in _PLUGINS:
            package, extra = _PLUGINS[choice]
            try:
                version(package)
            except PackageNotFoundError:
                install = f'pip install "rethink-prune[{extra}]"'
                raise UserError(f"{argument}: needs {package}; install it with {install}") from None
            # Submitit finds this out itself, but ends with a traceback.
            if choice == "slurm" and shutil.which("srun") is None:
                raise UserError(f"{argument}: there is no srun here; start it on a machine of the Slurm cluster")


def end_quietly_on_closed_pipe(arguments: Sequence[str]) -> None:
    """Let a command that only prints end without an error when its reader has gone, as in ``--help | head``."""
    # Not for studies: these must go on, and save, when the terminal that reads their log is gone.
    if not _PRINTING_OPTIONS.isdisjoint(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
