"""``python -m rethink_prune``: compose the configuration, validate it, run the study."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rethink_prune.commands import sweeps
from rethink_prune.commands.arguments import check_arguments, end_quietly_on_closed_pipe
from rethink_prune.errors import Interrupted, Refused, UserError
from rethink_prune.files import conf_dir
from rethink_prune.training.interrupts import Interrupts

_FULL_ERROR = "HYDRA_FULL_ERROR"  # set to 1, a user's error comes with its traceback


@hydra.main(config_path=conf_dir(), config_name="config", version_base="1.3")
def run_composed(tree: DictConfig) -> None:
    """Run the study that a composed configuration describes."""
    job = HydraConfig.get()
    # With hydra.job.chdir=true a job starts in its own folder, but paths are relative to where the command was started.
    os.chdir(job.runtime.cwd)
    with (
        sweeps.record_outcome(job) as outcome,
        sweeps.wait_for_requeue(),
        Interrupts(sweeps.stop_signals()) as interrupts,
    ):
        sweeps.refuse_after_deaths(outcome)
        # Imported here: Hydra's --help and its errors need no torch.
        from rethink_prune.study.compose_errors import check_hydra_keys
        from rethink_prune.study.prepare import check_config
        from rethink_prune.study.run import run_study
        from rethink_prune.training.distributed import this_process

        check_hydra_keys(cast(DictConfig, job))
        try:
            plain = cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
        plain["device"] = sweeps.choose_device(plain["device"], job)
        folder, experiment = Path(job.runtime.output_dir), job.runtime.choices.get("experiment")
        config = check_config(plain)
        if sweeps.is_packed(plain, job):
            outcome.update(state=sweeps.PLANNED, study=plain, experiment=experiment)
            return
        run_study(config, folder, interrupts, experiment=experiment, processes=this_process())


def run() -> None:
    """Let Hydra compose what the command line says, and run it.

    Raises
    ------
    UserError
        For what the user can correct; Hydra itself would print its own message, what it was given, and advice.
    """
    before = os.environ.get(_FULL_ERROR)
    # Hydra then raises its errors.
    os.environ[_FULL_ERROR] = "1"
    try:
        run_composed()
    except Refused as refused:
        raise refused.error from refused.__cause__
    except HydraException as error:
        from rethink_prune.study.compose_errors import composition_error

        raise composition_error(error, sys.argv[1:]) from error
    finally:
        os.environ.pop(_FULL_ERROR)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _run_what_is_left(jobs: Sequence[sweeps.Outcome]) -> None:
    # Imported here: it needs torch.
    from rethink_prune.commands.packing import run_packed

    run_packed(jobs)


def run_as_one_of_several(*, is_first: bool) -> None:
    """Run the study as the first of the processes that ``torchrun`` has started, or take part in it as another."""
    from rethink_prune.study.run import join_study
    from rethink_prune.training.distributed import connected

    command = sys.argv[1:]
    if is_first and {"-m", "--multirun", "hydra.mode=MULTIRUN"}.intersection(command):
        instead = "start it once for every study, or run the sweep without it: python -m rethink_prune -m ..."
        raise UserError(f"-m: torchrun starts one study; {instead}")
    with Interrupts() as interrupts, connected(command) as processes:
        if processes.is_first:
            run()
        else:
            join_study(interrupts, processes)


def main() -> None:
    """Run from the command line; a signal that was honoured ends the process with 128 + its number."""
    end_quietly_on_closed_pipe(sys.argv)
    # The rank is torchrun's number of this process. The first process alone prints what concerns all.
    rank = os.environ.get("RANK")
    is_first = rank in (None, "0")
    try:
        if rank is not None:
            run_as_one_of_several(is_first=is_first)
            return
        check_arguments(sys.argv, Path(conf_dir()))
        with Interrupts(), sweeps.raise_if_jobs_failed(_run_what_is_left):
            run()
    except UserError as error:
        if os.environ.get(_FULL_ERROR) == "1":
            raise
        sys.exit(str(error))
    except Interrupted as stop:
        # The signal may have come while an error was on its way to the user: that error is the reason.
        if stop.overtaken is not None or is_first:
            print(stop.overtaken or stop, file=sys.stderr)
        sys.exit(128 + stop.signum)


if __name__ == "__main__":
    main()
