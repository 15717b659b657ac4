"""What the work of a stage gets from the runner, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rethink_prune.surgery.architecture import Architecture
from rethink_prune.training.checkpoint import Checkpoints
from rethink_prune.training.progress import Row


@dataclass(frozen=True)
class Product:
    """What a stage's work makes.

    Attributes
    ----------
    weights : mapping of str to Tensor
        A state dict.
    architecture : Architecture
        Of the classifier it fits.
    result : dict
        What is recorded; plain values.
    sample : Tensor
        What `sample_logits` gives for it.
    picture : Tensor, optional
        Test pictures with what a detector finds, uint8 3 x H x W.
    """

    weights: Mapping[str, Tensor]
    architecture: Architecture
    result: dict[str, Any]
    sample: Tensor
    picture: Tensor | None = None


@dataclass(frozen=True)
class StageAccess:
    """What a stage's work gets from the runner: where its state is kept, and whom to tell its rows after an epoch."""

    checkpoints: Checkpoints
    on_epoch: Callable[[list[Row]], None]
