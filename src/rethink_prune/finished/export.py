"""Copy a finished network out of its store: in the form of a finished stage, and as ONNX, checked there."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch import nn

from rethink_prune.detection.detector import sampled_part
from rethink_prune.errors import UserError, first_line
from rethink_prune.files import write_atomically
from rethink_prune.finished.load import Factory, image_shape, load_model, read_config
from rethink_prune.state import full_state, sample_logits
from rethink_prune.store.stage import MODEL_FILE, SAMPLE_FILE, Stage
from rethink_prune.store.weights import save_weights
from rethink_prune.surgery.architecture import Architecture, apply_masks

# Greatest difference of a logit from torch's that an ONNX file may have, relative to the greatest logit.
ONNX_TOLERANCE = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
    model = load_model(stage.folder, factory)
    # The channels it had in the unpruned network matter to that one alone.
    architecture = Architecture.load(stage.folder).without_positions()
    # Whoever uses the weights without the masks must get the pruned network as well.
    apply_masks(model, architecture.masks)
    _make_export_folder(folder, stage.name)
    config_text = yaml.safe_dump({"stage": stage.name, **read_config(stage)}, sort_keys=False)
    write_atomically(folder / "config.yaml", config_text.encode())
    save_weights(folder / MODEL_FILE, full_state(model))
    architecture.save(folder)
    sample = sample_logits(sampled_part(model), image_shape(stage))
    save_weights(folder / SAMPLE_FILE, {"logits": sample})
    # Last, as in a study: a folder with a finished status is complete.
    Stage(folder).finish(result, files=(MODEL_FILE, SAMPLE_FILE, "architecture.json"))


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


def check_onnx_packages() -> None:
    """Raise `UserError` if a package that writing ONNX needs is not installed."""
    if missing := [name for name in _ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'rethink-prune[onnx]'")


def export_onnx(model: nn.Module, image_shape: Sequence[int], path: Path) -> float:
    """Write a network as ONNX, for batches of any size, and compare it with torch on one of eight random images.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, in evaluation mode.
    image_shape : sequence of int
        Shape of one image, C x H x W.
    path : Path
        The file; its input is ``images`` (float32, N x C x H x W, normalised), its output ``logits`` (N x classes).

    Returns
    -------
    float
        The greatest difference of a logit, relative to the greatest logit; at most `ONNX_TOLERANCE`.

    Raises
    ------
    UserError
        If a package is missing, the network cannot be written as ONNX, or computes something else there. No file is
        written then.
    """
    check_onnx_packages()
    # An extra of this package: it may not be installed.
    import onnxruntime

    try:
        program = torch.onnx.export(
            model,
            # Two images: torch.export takes a size of one for a constant.
            (torch.zeros(2, *image_shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
        )
        assert program is not None
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Exporter and runtime each have errors of their own, without a common class.
        raise UserError(f"{type(model).__name__}: cannot be written as ONNX: {first_line(error)}") from error
    images = torch.randn(8, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    # Written so that NaN, which compares as false, is refused as well.
    if not difference <= ONNX_TOLERANCE:
        limits = f"{difference:.1e} of the greatest, more than {ONNX_TOLERANCE:.0e}"
        raise UserError(f"{path}: not written: as ONNX, logits differ by {limits}")
    write_atomically(path, content)
    return difference
