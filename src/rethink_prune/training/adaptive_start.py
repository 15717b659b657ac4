"""Choose the learning rate at which retraining starts from what pruning removed: the adaptive linear schedule ALLR.

Zimmer, Spiegel and Pokutta, "How I Learned to Stop Worrying and Love Retraining", ICLR 2023 (arXiv:2111.00843), as
their code has it (https://github.com/ZIB-IOL/BIMP, ``define_retrain_schedule`` and ``after_pruning_callback`` in
``runners/baseRunner.py``). With the peak ``p`` of the learning rate in the unpruned network's training, its parameters
``W``, those that are left ``V``, and the share ``s`` of the prunable weights that went, retraining for ``n`` epochs
after a training of ``N`` starts at

    clip(p * d / sqrt(s), p * min(1, n / N), p)        where d = sqrt(| |W|^2 - |V|^2 |) / |W|

The norm is over all weights and biases, those of batch norms included; prunable are the weights of convolutions and
linear layers. From there the learning rate falls linearly to zero.

The text of the paper was not at hand: that it says the same as the code could not be checked. Their code removes single
weights; to take the same formula where channels or blocks go is our choice. Their schedule changes after every step,
here it changes after every epoch.
"""

from dataclasses import dataclass
from math import sqrt

from torch import nn

from rethink_prune.surgery.architecture import Masks


@dataclass(frozen=True)
class AdaptiveStart:
    """A start of the learning rate that follows from what pruning removed.

    Attributes
    ----------
    least : float
        The lowest start, as a share of the peak.
    rule : str
        The formula: a change of it needs another name.
    """

    least: float
    rule: str = "allr"

    def share(self, unpruned: nn.Module, pruned: nn.Module, masks: Masks) -> float:
        """Return the start as a share of the peak, in [`least`, 1].

        Parameters
        ----------
        unpruned, pruned : torch.nn.Module
            With the weights before and after pruning; on the CPU.
        masks : mapping of str to torch.Tensor
            By parameter name of `pruned`, True where a weight remains.

        Examples
        --------
        >>> import torch
        >>> unpruned, pruned = nn.Linear(4, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     change = unpruned.weight.copy_(torch.tensor([[4.0, 2.0, 2.0, 1.0]]))
        ...     change = pruned.weight.copy_(torch.tensor([[4.0, 2.0]]))
        >>> AdaptiveStart(least=0.25).share(unpruned, pruned, {})  # sqrt(25 - 20) / 5 / sqrt(1 / 2)
        0.632...
        """
        (norm, weights), (left_norm, left_weights) = _measure(unpruned, {}), _measure(pruned, masks)
        gone = 1 - left_weights / weights if weights else 0.0
        if gone <= 0 or norm == 0:
            return self.least
        drop = sqrt(abs(norm - left_norm) / norm)
        return min(1.0, max(self.least, drop / sqrt(gone)))


def _measure(model: nn.Module, masks: Masks) -> tuple[float, int]:
    """Return the squared norm of a network's parameters, and the number of those of convolutions and linear layers."""
    norm, weights = 0.0, 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        if name in masks:
            values = values[masks[name]]
        norm += float(values.square().sum())
        # Scales, shifts and biases have one dimension.
        weights += values.numel() if parameter.ndim > 1 else 0
    return norm, weights
