"""What a sensitivity scan starts from: the unpruned network of a run or of a stage, with a pruner and images.

Nothing that a summary or a stage names is imported: a user's own pruner or images are those the user types.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethink_prune.config import DatasetConfig, RecipeConfig, StudyConfig, parse_pruner
from rethink_prune.data import describe_dataset
from rethink_prune.errors import UserError, first_line
from rethink_prune.files import SUMMARY_FILE
from rethink_prune.finished.evaluate import compose_dataset, fit_images
from rethink_prune.finished.load import run_stages, single_stage
from rethink_prune.pruning import Pruner, find_pruner
from rethink_prune.store.stage import Stage
from rethink_prune.study.compose import Study
from rethink_prune.surgery.architecture import Architecture

# Options that say how much goes; a scan says it itself.
_AMOUNTS = {
    *("ratio", "variant", "widths", "target_macs", "target_params"),
    *("ranking", "distribution", "skip", "min_channels", "min_share", "round_to"),
}
_DATASET = "--dataset"


@dataclass(frozen=True)
class ScanSource:
    """A network to scan.

    Attributes
    ----------
    stage : Stage
        Finished; of an unpruned network.
    pruner : mapping of str to object
        ``name``, and options other than how much goes.
    config : StudyConfig
        Its data set, recipe, seed and store count.
    """

    stage: Stage
    pruner: Mapping[str, Any]
    config: StudyConfig


def scan_source(folder: Path, *, pruner: str | None, dataset: Sequence[str], limit: int | None) -> ScanSource:
    """Find what a scan of a folder takes.

    Parameters
    ----------
    folder : Path
        A run's, or that of a finished stage.
    pruner : str, optional
        A pruner's name or import path; by default the run's, and ``l1`` for a stage. The run's own pruner has the
        options it has there, another one its defaults.
    dataset : sequence of str
        The data set as overrides of a study; empty for that of the run.
    limit : int, optional
        Evaluate on so many test images, of every class alike.

    Raises
    ------
    UserError
        If the folder is neither, the network is pruned or missing, the pruner needs another network, or there are no
        images that fit.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    config = compose_dataset(dataset, _DATASET) if dataset else Study().config
    if (folder / SUMMARY_FILE).is_file():
        settings = _read_settings(folder)
        options = _pruner_options(folder, settings, pruner)
        config = _with_settings(config, folder, settings, own_images=not dataset)
        stage = _unpruned_stage(folder, options["name"], settings)
    else:
        stage, options = single_stage(folder), {"name": pruner or "l1"}
        stage.finished()
        if not dataset:
            raise UserError(f"{folder}: a stage does not say which images: {_DATASET} dataset=... dataset.root=...")
        config = _with_training(config, stage)
    # A pruner that takes no such ratio could not use another network either.
    layer_pruner(options, 0.5)
    _check_stage(stage, options["name"])
    try:
        images = fit_images(config.dataset, stage)
    except UserError as error:
        advice = "" if dataset else f"; to say where the images are: {_DATASET} dataset=... dataset.root=..."
        raise UserError(f"{error}{advice}") from None
    if limit is not None:
        if limit > (count := describe_dataset(images).test_images):
            raise UserError(f"--limit {limit}: there are only {count:,} test images")
        images = images.model_copy(update={"test_limit": limit})
    return ScanSource(stage, options, config.model_copy(update={"dataset": images}))


def layer_pruner(options: Mapping[str, Any], ratio: float | Mapping[str, float]) -> Pruner[Any, Any]:
    """Return a pruner that takes a share of every layer, or of layers by name or pattern.

    Parameters
    ----------
    options : mapping of str to object
        Its ``name``, and options other than how much goes.
    ratio : float or mapping of str to float

    Raises
    ------
    UserError
        If it is no pruner, or takes no such ratio.

    Examples
    --------
    >>> layer_pruner({"name": "slimming"}, {"conv1": 0.5}).options.ranking
    'layer'
    """
    kind = find_pruner(options["name"])
    fields = kind.options_type.model_fields
    single = {name: value for name, value in (("ranking", "layer"), ("distribution", "uniform")) if name in fields}
    try:
        return kind(parse_pruner({**options, **single, "ratio": ratio}, kind.options_type))
    except UserError as error:
        why = f"cannot prune one layer by a ratio ({first_line(error)})"
        raise UserError(f"{options['name']}: {why}; name another pruner, such as --pruner l1") from None


def _read_settings(run_dir: Path) -> dict[str, Any]:
    """Return what a run's summary says its results depend on, and its seed."""
    path = run_dir / SUMMARY_FILE
    try:
        study = json.loads(path.read_text())["study"]
        settings = {**study["settings"], "seed": study["seed"]}
        parts = [settings[name] for name in ("dataset", "pruner", "recipe")]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged or of an earlier version: it does not say what was set") from None
    if not all(isinstance(part, dict) and isinstance(part.get("name"), str) for part in parts):
        raise UserError(f"{path}: is damaged: it does not name data set, pruner and recipe")
    return settings


def _pruner_options(run_dir: Path, settings: Mapping[str, Any], named: str | None) -> dict[str, Any]:
    of_run = {key: value for key, value in settings["pruner"].items() if key != "source" and key not in _AMOUNTS}
    if named is not None and named != of_run["name"]:
        return {"name": named}
    if named is None and ":" in of_run["name"]:
        raise UserError(f"{run_dir}: was pruned by a pruner of your own; name it: --pruner {of_run['name']}")
    return of_run


def _with_settings(config: StudyConfig, run_dir: Path, settings: Mapping[str, Any], *, own_images: bool) -> StudyConfig:
    """Return the configuration with a run's recipe and seed, and with its images if those are asked for."""
    options = {key: value for key, value in settings["dataset"].items() if key != "fingerprint"}
    if own_images and ":" in options["name"]:
        raise UserError(
            f"{run_dir}: has images of your own; say what reads them: {_DATASET} dataset.name={options['name']} ..."
        )
    try:
        changes: dict[str, Any] = {"recipe": RecipeConfig.model_validate(settings["recipe"])}
        if own_images:
            changes["dataset"] = DatasetConfig.model_validate(options)
        return StudyConfig.model_validate({**dict(config), **changes, "seed": settings["seed"]})
    except ValueError:  # pydantic's errors are such
        raise UserError(f"{run_dir / SUMMARY_FILE}: is damaged or of another version") from None


def _with_training(config: StudyConfig, stage: Stage) -> StudyConfig:
    """Return the configuration with the seed and the batches of a stage's training, as far as it tells them."""
    trained, recipe = stage.config(), config.recipe.model_dump()
    try:
        key = trained.get("key", {})
        if "training" in key:  # weights that a user brought have none
            recipe |= {"batch_size": key["training"]["batch_size"], "augment": key["data"]["augment"] is not None}
        return StudyConfig.model_validate({**dict(config), "recipe": recipe, "seed": trained.get("seed", config.seed)})
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{stage.folder / 'config.yaml'}: is damaged or of another version") from None


def _unpruned_stage(run_dir: Path, pruner: str, settings: Mapping[str, Any]) -> Stage:
    """Return the stage of a run whose network is to be scanned."""
    kind = find_pruner(pruner)
    name = "sparse" if kind.trains_sparse and pruner == settings["pruner"]["name"] else "large"
    stages = run_stages(run_dir)
    if name not in stages:
        advice = "; run it again with large.baseline=true, which trains it" if name == "large" else ""
        raise UserError(f"{run_dir}: has no finished {name} network{advice}")
    return stages[name]


def _check_stage(stage: Stage, pruner: str) -> None:
    """Raise `UserError` unless a stage's network is unpruned, and trained by the pruner if that is its way."""
    stage.finished()
    if any(vars(Architecture.load(stage.folder)).values()):
        raise UserError(f"{stage.folder}: holds a pruned network; give the stage large of its study, or its run")
    key = stage.config().get("key")
    trained_by = key["pruner"] if isinstance(key, dict) and isinstance(key.get("pruner"), dict) else {}
    if find_pruner(pruner).trains_sparse and trained_by.get("name") != pruner:
        raise UserError(
            f"--pruner {pruner}: prunes networks that it has trained its own way; give a run with pruner={pruner}, or "
            "its stage sparse"
        )
