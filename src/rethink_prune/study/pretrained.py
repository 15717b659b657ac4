"""Weights that a user brings along for the unpruned network.

Nothing here executes code from a file: safetensors, and torch files with ``weights_only=True``.
"""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rethink_prune.errors import UserError, first_line
from rethink_prune.files import file_digest
from rethink_prune.store.stage import MODEL_FILE, Stage

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Checkpoint:
    """Weights for the unpruned network.

    Attributes
    ----------
    state : mapping of str to Tensor
    digest : str
        SHA-256 of the content they came from.
    result : mapping
        What the stage they came from recorded; empty for other files, whose training is not known.
    """

    state: Mapping[str, Tensor]
    digest: str
    result: Mapping[str, Any]

    @property
    def training_cost(self) -> dict[str, Any]:
        """Epochs and FLOPs of their training; None where they do not come from a stage."""
        return {name: self.result.get(name) for name in ("epochs", "train_flops")}


def read_checkpoint(source: str, model: nn.Module, network: str) -> Checkpoint:
    """Read ``large.checkpoint`` and see that it fits `model`, whose present weights are overwritten.

    Parameters
    ----------
    source : str
        A stage folder; a safetensors file; a torch file with a state dict, or with a dict that holds one as
        ``state_dict`` or ``model``; or ``torchvision:NAME``, the weights of that name for a torchvision network.
    model : torch.nn.Module
        The unpruned network.
    network : str
        Its name.

    Raises
    ------
    UserError
        If there is no such file, it holds pickled objects, or it belongs to another network.
    """
    result: Mapping[str, Any] = {}
    if source.startswith(TORCHVISION):
        state = _torchvision_state(source, network)
        digest = hashlib.sha256(source.encode()).hexdigest()
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            found = Stage(path).result()
            if found is None:
                raise UserError(f"large.checkpoint={source}: is a folder, but not a finished stage")
            result, path = found, path / MODEL_FILE
        if not path.is_file():
            raise UserError(f"large.checkpoint={source}: no such file or folder")
        state, digest = _file_state(path, source), file_digest(path)
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not in {network}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [f"{name} is not finite" for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"large.checkpoint={source}: not the weights of {network}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)
    return Checkpoint(state, digest, result)


def _file_state(path: Path, source: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"large.checkpoint={source}: holds pickled objects, which loading would execute; "
            "save the network's state_dict() instead"
        ) from None
    except Exception as error:  # torch.load fails in as many ways as files can be damaged
        raise UserError(f"large.checkpoint={source}: cannot be read ({first_line(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (isinstance(content, Mapping) and all(map(_is_dense, content.values()))):
        raise UserError(f"large.checkpoint={source}: holds no state dict, nor one as 'state_dict' or 'model'")
    return dict(content)


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _torchvision_state(source: str, network: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    module, _, factory = network.partition(":")
    if not module.startswith("torchvision.models"):
        raise UserError(f"large.checkpoint={source}: is for torchvision networks, not for {network}")
    known = get_model_weights(factory).__members__
    name = source.removeprefix(TORCHVISION)
    if name not in known:
        raise UserError(f"large.checkpoint={source}: {factory} has {', '.join(known)}")
    url = known[name].url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    except OSError as error:
        file, folder = url.rsplit("/", 1)[-1], Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"large.checkpoint={source}: cannot be downloaded ({error}); put {file} (from {url}) into {folder}"
        ) from None
