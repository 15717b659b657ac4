"""Networks from finished stages, and the stages that a run has left in the store.

Nothing here executes code that a stage names: its files are safetensors, JSON and YAML's safe subset.
"""

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from rethink_prune.detection.detector import DetectorSpec, build_detector, sampled_part
from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE
from rethink_prune.models import build_model
from rethink_prune.seeds import derive_seed, seeded
from rethink_prune.state import load_full_state, sample_logits
from rethink_prune.store.stage import SAMPLE_FILE, Stage
from rethink_prune.store.weights import load_stage_weights, load_weights
from rethink_prune.study.arms import known_arm
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

Factory = Callable[..., nn.Module]
# Greatest difference of a logit, relative to the greatest.
_SAMPLE_TOLERANCE = 0.02
_NETWORK_KEYS = {"name": str, "options": dict, "num_classes": int, "in_channels": int, "image_size": int}


def load_model(folder: str | Path, factory: Factory | None = None) -> nn.Module:
    """Rebuild the network of a finished stage.

    Parameters
    ----------
    folder : path
        The stage's folder, ``STORE/stages/<kind>-<key>``, or a copy that ``rethink_prune.export`` made of it.
    factory : callable, optional
        Builds the unpruned network, called as ``factory(num_classes=..., **options)``; it also gets ``in_channels`` if
        it has such a parameter. Needed for a network of your own: a stage never says what to import.

    Returns
    -------
    torch.nn.Module
        On the CPU, in evaluation mode. A detector is torchvision's ``FasterRCNN``: it takes a list of pictures,
        3 x H x W in [0, 1].

    Raises
    ------
    UserError
        If the folder holds no finished, intact stage, or a factory is needed and missing, or builds another network.

    Examples
    --------
    >>> import tempfile, yaml
    >>> from rethink_prune.store.weights import save_weights
    >>> stage = Stage(Path(tempfile.mkdtemp()))
    >>> network = {"name": "resnet20", "options": {}, "num_classes": 7, "in_channels": 3, "image_size": 32}
    >>> _ = (stage.folder / "config.yaml").write_text(yaml.safe_dump({"network": network}))
    >>> save_weights(stage.model_file, build_model("resnet20", num_classes=7).state_dict())
    >>> Architecture().save(stage.folder)
    >>> stage.finish({}, files=[stage.model_file.name, "architecture.json"])
    >>> load_model(stage.folder).fc
    Linear(in_features=64, out_features=7, bias=True)
    """
    stage = Stage(Path(folder))
    stage.finished()
    model = reshape(build_unpruned(stage, factory), Architecture.load(stage.folder))
    found = detector_of(stage)
    if found is not None:
        model = build_detector(model, found)
    try:
        load_full_state(model, load_stage_weights(stage))
    except RuntimeError as error:
        raise UserError(f"{folder}: holds other weights than {type(model).__name__} has: {_one_line(error)}") from None
    _check_sample(model.eval(), stage)
    return model


def _check_sample(model: nn.Module, stage: Stage) -> None:
    """Raise `UserError` unless a network computes what it did when its stage was made."""
    if not (stage.folder / SAMPLE_FILE).is_file():  # made by an earlier version
        return
    expected = load_weights(stage.folder / SAMPLE_FILE)["logits"]
    found = sample_logits(sampled_part(model), image_shape(stage))
    # Wide enough for other devices and kernels; what a network lacks shows in the first digit.
    limit = _SAMPLE_TOLERANCE * float(expected.abs().max())
    if bool(expected.isfinite().all()) and not bool(((found - expected).abs() <= limit).all()):
        raise UserError(
            f"{stage.folder}: {type(model).__name__} gives other logits than when the stage was made: it computes with "
            "something that is no parameter and no buffer, such as numbers drawn in the constructor; make it a buffer"
        )


def build_unpruned(stage: Stage, factory: Factory | None = None) -> nn.Module:
    """Build the network that a stage's was pruned from, with arbitrary weights; arguments as for `load_model`."""
    with _same_draws(stage):
        return build_described(read_config(stage)["network"], str(stage.folder), factory)


def build_described(network: Mapping[str, Any], where: str, factory: Factory | None = None) -> nn.Module:
    """Build an unpruned network from what a stage or a summary says about it.

    Parameters
    ----------
    network : mapping
        As in `read_config`; `describes_network` accepts it.
    where : str
        What says so, for messages.
    factory : callable, optional
        As for `load_model`.

    Raises
    ------
    UserError
        If a factory is needed and missing, or fails.

    Examples
    --------
    >>> network = {"name": "resnet20", "options": {}, "num_classes": 7, "in_channels": 3, "image_size": 32}
    >>> build_described(network, "a summary").fc.out_features
    7
    """
    name, options = network["name"], network["options"]
    sizes = {"num_classes": network["num_classes"], "in_channels": network["in_channels"]}
    if factory is None:
        if ":" in name:
            how = "load_model(folder, factory=...), or --factory path.to.module:factory on the command line"
            raise UserError(f"{where}: holds {name}, a network of your own; say what builds it: {how}")
        return build_model(name, **sizes, **options)
    try:
        if "in_channels" not in inspect.signature(factory).parameters:
            del sizes["in_channels"]
        model = factory(**sizes, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{where}: the factory failed with {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{where}: the factory gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def describes_network(network: object) -> bool:
    """Tell whether a value has what `build_described` needs.

    Examples
    --------
    >>> describes_network({"name": "resnet20"})
    False
    """
    return isinstance(network, dict) and all(isinstance(network.get(k), kind) for k, kind in _NETWORK_KEYS.items())


def _same_draws(stage: Stage) -> AbstractContextManager[None]:
    """Return the context in which a constructor draws what it drew in the study."""
    seed = read_config(stage).get("seed")
    return seeded(derive_seed(seed, "large-init")) if isinstance(seed, int) else nullcontext()


def read_config(stage: Stage) -> dict[str, Any]:
    """Return what a stage says about itself.

    Returns
    -------
    dict
        ``network`` has name, options, num_classes, in_channels and image_size of the unpruned network; ``images``, if
        it is there, ``mean`` and ``std`` per channel, by which images were normalised.

    Raises
    ------
    UserError
        If it does not describe a network.
    """
    config = stage.config()
    network = config.get("network")
    # Anybody may have written the file, and build_model gets what stands in it.
    if not describes_network(network):
        raise UserError(f"{stage.folder / 'config.yaml'}: is damaged or of another version: it describes no network")
    return config


def detector_of(stage: Stage) -> DetectorSpec | None:
    """Return what a stage's detector was built for; None if its network is a classifier.

    Raises
    ------
    UserError
        If what it says about the detector is damaged.
    """
    plain = read_config(stage).get("detector")
    try:
        return None if plain is None else DetectorSpec.from_plain(plain)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{stage.folder / 'config.yaml'}: is damaged: it describes no detector") from None


def image_shape(stage: Stage) -> tuple[int, int, int]:
    """Return the shape of one image that the stage's network takes, C x H x W."""
    network = read_config(stage)["network"]
    return network["in_channels"], network["image_size"], network["image_size"]


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
    for name, stage in run_stages(run_dir).items():
        arm = known_arm(name)
        if name == "pruned" or (arm is not None and arm.network == "pruned"):
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


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
