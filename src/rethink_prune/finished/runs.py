"""Which stages a run has left in the store."""

import json
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE
from rethink_prune.store.stage import Stage
from rethink_prune.study.arms import ARMS


def run_stages(run_dir: Path) -> dict[str, Stage]:
    """Return the finished stages of a run by name: ``large``, ``sparse``, ``pruned`` and the arms.

    Raises
    ------
    UserError
        If its summary cannot be read.
    """
    path = run_dir / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text())
        entries = {name: summary.get(name, {}) for name in ("large", "sparse", "pruned")} | summary.get("arms", {})
        # A failed part of a study, or one without a stage of its own, has no folder.
        return {name: Stage(Path(entry["stage"])) for name, entry in entries.items() if "stage" in entry}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged") from None


def pruned_stage(run_dir: Path) -> Stage:
    """Return a finished stage with the pruned network of a run; all of them have the same architecture.

    Raises
    ------
    UserError
        If there is none.
    """
    names = {"pruned", *(name for name, arm in ARMS.items() if arm.network == "pruned")}
    for name, stage in run_stages(run_dir).items():
        if name in names:
            return stage
    raise UserError(f"{run_dir}: has no finished stage with the pruned network")


def single_stage(folder: Path) -> Stage:
    """Return the stage in a folder.

    Raises
    ------
    UserError
        If it is a run's folder; the message lists the run's stages.

    Examples
    --------
    >>> single_stage(Path("store/stages/large-0123")).name
    'large-0123'
    """
    if (folder / SUMMARY_FILE).is_file():
        stages = ", ".join(str(stage.folder) for stage in run_stages(folder).values())
        raise UserError(f"{folder}: is a run; give one of its stages: {stages or 'there is none yet'}")
    # A stage's name is its folder's, which "." does not show.
    return Stage(folder.resolve())
