"""Copy a finished network out of its store, in the form of a finished stage."""

from pathlib import Path

import yaml

from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically
from rethink_prune.finished.load import Factory, load_model, read_config
from rethink_prune.store.stage import MODEL_FILE, Stage
from rethink_prune.store.weights import save_weights
from rethink_prune.surgery.architecture import Architecture, apply_masks


def export_stage(stage: Stage, folder: Path, factory: Factory | None = None) -> None:
    """Copy what is needed to use a stage's network without the store.

    Parameters
    ----------
    stage : Stage
        Finished.
    folder : Path
        Gets ``model.safetensors`` (the state dict; masked weights are zero), ``architecture.json`` (and
        ``architecture.safetensors``, if it has masks or selections), ``config.yaml`` (the unpruned network, how images
        were normalised, how it was trained) and ``status.json`` (checksums and results).
    factory : callable, optional
        As for :func:`~rethink_prune.finished.load.load_model`.

    Raises
    ------
    UserError
        If the stage cannot be loaded, or something else is in `folder`.
    """
    result = stage.finished()
    model, architecture = load_model(stage.folder, factory), Architecture.load(stage.folder)
    # Whoever uses the weights without the masks must get the pruned network as well.
    apply_masks(model, architecture.masks)
    _make_export_folder(folder, stage.name)
    config_text = yaml.safe_dump({"stage": stage.name, **read_config(stage)}, sort_keys=False)
    write_atomically(folder / "config.yaml", config_text.encode())
    save_weights(folder / MODEL_FILE, model.state_dict())
    architecture.save(folder)
    # Last, as in a study: a folder with a finished status is complete.
    Stage(folder).finish(result, files=(MODEL_FILE, "architecture.json"))


def _make_export_folder(folder: Path, name: str) -> None:
    """Make a folder for an export; only an earlier export of the same stage may be in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    config = folder / "config.yaml"
    if not (is_empty or (config.is_file() and config.read_text().startswith(f"stage: {name}\n"))):
        raise UserError(f"{folder}: holds something else already; name another folder with --out")
