"""Write a network as ONNX, and check that it computes the same there."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically

# Greatest difference of a logit from torch's that an ONNX file may have, relative to the greatest logit.
ONNX_TOLERANCE = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'rethink-prune[onnx]'")
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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{type(model).__name__}: cannot be written as ONNX: {reason}") from error
    images = torch.randn(8, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    # Written so that NaN, which compares as false, is refused as well.
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"{path}: not written: as ONNX, logits differ by {difference:.1e} of the greatest, "
            f"more than {ONNX_TOLERANCE:.0e}"
        )
    write_atomically(path, content)
    return difference
