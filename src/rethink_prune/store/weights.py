"""The weights of stages, as safetensors files: loading one executes nothing."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from rethink_prune.files import write_atomically
from rethink_prune.store.stage import Stage


def weights_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Return a state dict as the content of a safetensors file.

    Examples
    --------
    >>> import torch
    >>> len(weights_bytes({"weight": torch.zeros(10)}))
    112
    """
    # The format refuses tensors that share storage or are not contiguous; copies share nothing.
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict to a safetensors file, atomically."""
    write_atomically(path, weights_bytes(state))


def load_stage_weights(stage: Stage) -> dict[str, Tensor]:
    """Return the weights of a finished stage, on the CPU."""
    return load_weights(stage.model_file)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return what `save_weights` wrote, on the CPU."""
    return safetensors.torch.load_file(path)
