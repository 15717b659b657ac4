"""How a network is trained and evaluated on this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Runtime:
    """Device, precision and speed; no choice here changes a result by more than float tolerance.

    Attributes
    ----------
    precision : {"fp32", "bf16"}
    accelerate : {"auto", "compile", "off"}
        ``auto`` takes the channels-last memory format and, on CUDA, a fused optimiser and recorded steps
        (:mod:`rethink_prune.training.accelerate`); ``compile`` takes ``torch.compile`` as well.
    checkpoint_seconds : float
        At least this long between two checkpoints.
    show_progress : bool
        Draw a progress bar.

    Examples
    --------
    >>> runtime = Runtime(torch.device("cpu"), "fp32")
    >>> model = runtime.place(nn.Conv2d(3, 8, 3))
    >>> model.weight.is_contiguous(memory_format=torch.channels_last)
    True
    >>> with runtime.autocast():
    ...     model(torch.zeros(1, 3, 4, 4)).dtype
    torch.float32
    """

    device: torch.device
    precision: str
    accelerate: str = "auto"
    checkpoint_seconds: float = 60.0
    show_progress: bool = False

    @property
    def accelerates_cuda(self) -> bool:
        """Whether a CUDA device runs the fused optimiser and recorded steps."""
        return self.accelerate != "off" and self.device.type == "cuda"

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to the device, in the memory format in which its convolutions are fastest."""
        memory_format = torch.contiguous_format if self.accelerate == "off" else torch.channels_last
        return model.to(self.device).to(memory_format=memory_format)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the forward pass runs; weights and their updates stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
