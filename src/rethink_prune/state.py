"""All tensors of a network: its state dict, and the buffers that a state dict leaves out; and what it computes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rethink_prune.outputs import main_output
from rethink_prune.seeds import seeded
from rethink_prune.surgery.architecture import SELECTED


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict together with its buffers that are not persistent.

    Without these, a network whose forward pass reads such a buffer would compute something else when it is loaded.
    Selections are no part of it: they belong to the architecture.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.register_buffer("scale", model.weight.new_ones(1), persistent=False)
    >>> list(full_state(model))
    ['weight', 'scale']
    """
    return {**model.state_dict(), **_temporary_buffers(model)}


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `full_state` returned; buffers that are not persistent may be missing.

    Raises
    ------
    RuntimeError
        As ``load_state_dict`` does.
    """
    buffers = _temporary_buffers(model)
    model.load_state_dict({name: tensor for name, tensor in state.items() if name not in buffers})
    for name, buffer in buffers.items():
        if name in state:
            buffer.copy_(state[name])


@torch.no_grad()
def sample_logits(model: nn.Module, image_shape: Sequence[int]) -> Tensor:
    """Return a network's logits, in evaluation mode, for four random images that are always the same.

    A stage keeps them, so that whoever loads its network can see that it computes what it did.

    Examples
    --------
    >>> sample_logits(nn.Flatten(), (1, 2, 2)).shape
    torch.Size([4, 4])
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    with seeded(0):
        logits = main_output(model.eval()(images)).float().cpu()
    model.train(was_training)
    return logits


def _temporary_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}".removeprefix("."): module.get_buffer(name)
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if name != SELECTED and module._buffers.get(name) is not None
    }
