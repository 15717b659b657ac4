"""Trying, before anything is trained, what a study will do with a network that is not ours: on copies, on the CPU.

A network by import path may do in training what its evaluation, or its trace, does not show. Whatever can fail for such
reasons fails here, in one line, and not after hours.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from rethink_prune.copying import copy_network
from rethink_prune.data import DatasetInfo
from rethink_prune.errors import UserError, first_line
from rethink_prune.outputs import main_output, output_loss, unused_outputs
from rethink_prune.seeds import seeded
from rethink_prune.state import full_state, load_full_state
from rethink_prune.training.runtime import Runtime

log = logging.getLogger(__name__)

UNSEEDED = (
    "draws random numbers that the seed does not reach (an unseeded numpy.random.default_rng(), random.Random() or "
    "torch.Generator()); seed them, or draw from the global generators"
)


def check_output(model: nn.Module, info: DatasetInfo, where: str) -> None:
    """Raise `UserError` unless a network takes one image, gives its logits and stays as it is; in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
    info : DatasetInfo
    where : str
        Begins messages, e.g. ``"model.name=nets:Net"``.
    """
    shape = (1, info.channels, info.image_size, info.image_size)
    before = {name: tensor.clone() for name, tensor in full_state(model).items()}
    try:
        with torch.no_grad(), seeded(0):
            output = main_output(model.eval()(torch.zeros(shape)))
    except Exception as error:  # a user's forward may raise anything
        size = f"{info.channels} x {info.image_size} x {info.image_size}"
        raise UserError(
            f"{where}: fails on images of {size} (dataset.channels, dataset.image_size): {first_line(error)}"
        ) from error
    _check_logits(output, 1, info, where)
    after = full_state(model)
    changed = [name for name in before if not torch.equal(after[name].nan_to_num(), before[name].nan_to_num())]
    if changed:
        raise UserError(f"{where}: changes {changed[0]} in evaluation mode; only training may change a network")


def check_state(model: nn.Module, again: nn.Module, where: str) -> None:
    """Raise `UserError` unless a state dict holds tensors alone, which a network that is built again has, too.

    Parameters
    ----------
    model, again : torch.nn.Module
        Built by the same calls with the same seed.
    where : str
        As for `check_output`.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{where}: {name}: is a {kind}, and a stage holds tensors alone; make it a tensor")
    second = full_state(again)
    if any(not torch.equal(tensor, second[name]) for name, tensor in full_state(model).items()):
        raise UserError(f"{where}: in its constructor, {UNSEEDED}")


def try_training(model: nn.Module, info: DatasetInfo, runtime: Runtime, where: str) -> Runtime:
    """Train and evaluate copies of a network for a step, in the memory format of the study.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU; left as it is.
    info, where
        As for `check_output`.
    runtime : Runtime
        How the study means to train.

    Returns
    -------
    Runtime
        With the contiguous memory format where the network takes no other.

    Raises
    ------
    UserError
        If the network cannot be trained, draws what no seed decides, or keeps what no checkpoint holds.
    """
    try:
        logits, trained = _train_copy(model, info, runtime, where)
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        contiguous = replace(runtime, contiguous=True)
        if runtime.memory_format == contiguous.memory_format:
            raise UserError(f"{where}: cannot be trained: {first_line(error)}") from error
        runtime = try_training(model, info, contiguous, where)
        log.warning("%s: takes no channels-last images (%s), so it gets contiguous ones", where, first_line(error))
        return runtime
    again, _ = _train_copy(model, info, runtime, where)
    if not torch.equal(logits.nan_to_num(), again.nan_to_num()):
        raise UserError(f"{where}: in its forward pass, {UNSEEDED}")
    # What a study does when it goes on from a checkpoint, and when it loads what another stage has trained.
    resumed = copy_network(model)
    load_full_state(resumed, full_state(trained))
    if not torch.equal(*(_logits(network, info, runtime).nan_to_num() for network in (trained, resumed))):
        raise UserError(
            f"{where}: in its forward pass, changes what is no parameter and no buffer and computes with it, and a "
            "checkpoint would not hold it; make it a buffer"
        )
    return runtime


def _images(info: DatasetInfo, runtime: Runtime) -> Tensor:
    size = (2, info.channels, info.image_size, info.image_size)
    return runtime.take(torch.randn(size, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def _logits(model: nn.Module, info: DatasetInfo, runtime: Runtime) -> Tensor:
    """Return the logits of a network in training mode."""
    with seeded(0):
        logits: Tensor = main_output(model.to(memory_format=runtime.memory_format).train()(_images(info, runtime)))
    return logits


def _train_copy(model: nn.Module, info: DatasetInfo, runtime: Runtime, where: str) -> tuple[Tensor, nn.Module]:
    """Return the logits of a copy in training mode, and the copy after a backward pass and an evaluation."""
    images = _images(info, runtime)
    tried = copy_network(model).to(memory_format=runtime.memory_format).train()
    with seeded(0):
        output = tried(images)
        logits = main_output(output)
        _check_logits(logits, 2, info, f"{where}: in training mode")
        output_loss(output, torch.arange(2) % info.num_classes).backward()
        with torch.no_grad():
            tried.eval()(images)
    if unused_outputs(output):
        log.info("%s: gives more than logits in training; the loss is that of the logits alone", where)
    return logits.detach(), tried


def _check_logits(output: object, images: int, info: DatasetInfo, where: str) -> None:
    if not (isinstance(output, Tensor) and output.shape == (images, info.num_classes)):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = "one image" if images == 1 else f"{images} images"
        raise UserError(f"{where}: must give logits of {images} x {info.num_classes} for {what}; gave {shape}")
