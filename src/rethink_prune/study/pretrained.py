"""Weights that a user brings along for the unpruned network.

Nothing here executes code from a file: safetensors, and torch files with ``weights_only=True``.
"""

import hashlib
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rethink_prune.errors import UserError, first_line
from rethink_prune.files import file_digest
from rethink_prune.store.stage import MODEL_FILE, Stage

log = logging.getLogger(__name__)

TORCHVISION = "torchvision:"
# Under which names training scripts keep the state dict of a network; the average of the weights (EMA) comes last.
_STATES = ("state_dict", "model", "module", "state_dict_ema", "model_ema")


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
        ``state_dict``, ``model``, ``module``, ``state_dict_ema`` or ``model_ema``; or ``torchvision:NAME``, the weights
        of that name for a torchvision network. Names may have a prefix, such as ``module.`` or ``model.``.
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
    expected = model.state_dict()
    state = _match_names(state, expected, source)
    # As torch's own strict load_state_dict: files from before batch norms counted batches are complete.
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    state = {name: expected[name] for name in optional if name not in state} | state
    missing = [f"{name} is missing" for name in expected if name not in state]
    unknown = [f"{name} is not in {network}" for name in state if name not in expected]
    # In turn, so that names with an unexpected prefix stand beside those they may be meant for.
    problems = [problem for pair in zip_longest(missing, unknown) for problem in pair if problem]
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
    for key in _STATES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (isinstance(content, Mapping) and all(map(_is_dense, content.values()))):
        raise UserError(f"large.checkpoint={source}: holds no state dict, nor one as {_named(_STATES)}")
    return dict(content)


def _match_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dict under a network's names, without what wrappers of the network put before these."""
    # Of torch.compile, and of the average of weights.
    state = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in state.items() if name != "n_averaged"}
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    if not needed or set(needed) <= state.keys():
        return state
    candidates = {name.removesuffix(needed[0]) for name in state if name.endswith(f".{needed[0]}")}
    prefixes = sorted(p for p in candidates if all(f"{p}{name}" in state for name in needed))
    if len(prefixes) > 1:
        raise UserError(f"large.checkpoint={source}: holds several networks of these names: {', '.join(prefixes)}")
    if not prefixes:
        return state
    (prefix,) = prefixes
    if others := [name for name in state if not name.startswith(prefix)]:
        log.warning("large.checkpoint=%s: takes what is in %s; leaves out %s", source, prefix[:-1], ", ".join(others))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _named(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


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
