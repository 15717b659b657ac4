"""Trying, before anything is trained, what a study will do with a network that is not ours: on copies, on the CPU.

A network by import path may do in training what its evaluation, or its trace, does not show. Whatever can fail for such
reasons fails here, in one line, and not after hours.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from rethink_prune.copying import copy_network
from rethink_prune.cost import on_meta
from rethink_prune.data import DatasetInfo
from rethink_prune.errors import UserError, first_line
from rethink_prune.outputs import main_output, output_loss, unused_outputs
from rethink_prune.seeds import seeded
from rethink_prune.state import copied_state, full_state, load_full_state, overlapping, remembered, same_value
from rethink_prune.surgery.graph import have_same_calls, trace
from rethink_prune.training.runtime import Runtime

log = logging.getLogger(__name__)

UNSEEDED = (
    "draws random numbers that the seed does not reach (an unseeded numpy.random.default_rng(), random.Random() or "
    "torch.Generator()); seed them, or draw from the global generators"
)


def check_output(model: nn.Module, info: DatasetInfo, where: str) -> None:
    """Raise `UserError` unless a network takes one image and gives its logits; leaves it in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
    info : DatasetInfo
    where : str
        Begins messages, e.g. ``"model.name=nets:Net"``.
    """
    shape = (1, info.channels, info.image_size, info.image_size)
    try:
        with torch.no_grad(), seeded(0):
            output = main_output(copy_network(model.eval())(torch.zeros(shape)))
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        size = f"{info.channels} x {info.image_size} x {info.image_size}"
        raise UserError(
            f"{where}: fails on images of {size} (dataset.channels, dataset.image_size): {first_line(error)}"
        ) from error
    _check_logits(output, 1, info, where)


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
    if shared := overlapping(dict([*model.named_parameters(), *model.named_buffers()])):
        raise UserError(
            f"{where}: {' and '.join(shared)}: use the same memory, which a copy would not; to share a weight, give "
            "both modules the same parameter"
        )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"{where}: {name}: has a hook on its gradient, which no copy of the network would have")
    if not same_value(full_state(model), full_state(again)):
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
        logits = _train_copy(model, info, runtime, where)
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        contiguous = replace(runtime, contiguous=True)
        if runtime.memory_format == contiguous.memory_format:
            raise UserError(f"{where}: cannot be trained: {first_line(error)}") from error
        runtime = try_training(model, info, contiguous, where)
        log.warning("%s: takes no channels-last images (%s), so it gets contiguous ones", where, first_line(error))
        return runtime
    if not same_value(logits, _train_copy(model, info, runtime, where)):
        raise UserError(f"{where}: in its forward pass, {UNSEEDED}")
    _check_keeps_nothing(model, info, runtime, where)
    return runtime


def _check_keeps_nothing(model: nn.Module, info: DatasetInfo, runtime: Runtime, where: str) -> None:
    """Raise `UserError` if a copy keeps what no state dict holds, so that a training could not go on after a stop."""
    tried = copy_network(model)
    start = copied_state(tried)
    images = _images(info, runtime)
    found: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    for _ in range(2):
        load_full_state(tried, start)
        with seeded(0), torch.no_grad():
            logits = {"training": main_output(tried.to(memory_format=runtime.memory_format).train()(images))}
            trained = copied_state(tried)
            # Other images: a maximum of what was seen, say, would stay as it is.
            logits["evaluation"] = main_output(tried.eval()(runtime.take(2 * images)))
        after = full_state(tried)
        if added := sorted(after.keys() ^ start.keys()):
            raise UserError(
                f"{where}: has {added[0]} only before or after it has run: register it in the constructor, in its shape"
            )
        for name, tensor in trained.items():
            if not same_value(after[name], tensor):
                raise UserError(
                    f"{where}: in evaluation mode, changes {name}, so its logits depend on what it saw before"
                )
        found.append((remembered(tried), logits))
    if not _has_same_trace(model, tried):
        raise UserError(
            f"{where}: runs other operations once it has run, because its forward pass sets attributes; set "
            "them in the constructor"
        )
    (first, logits), (second, logits_again) = found
    changed = [name for name, value in second.items() if name in first and not same_value(first[name], value)]
    if changed or not same_value(logits, logits_again):
        what = f"changes {changed[0]} in every step" if changed else "keeps something from step to step"
        raise UserError(
            f"{where}: {what}, in no buffer: a training that goes on after a stop would not have it; make it a buffer "
            "(register_buffer, changed in place), and draw random numbers from the global generators"
        )


def _has_same_trace(fresh: nn.Module, used: nn.Module) -> bool:
    """Tell whether a network is traced alike before and after it ran; also if it cannot be traced at all."""
    try:
        graph = trace(on_meta(fresh))
    except UserError:  # whoever needs a trace says so
        return True
    try:
        return have_same_calls(graph, trace(on_meta(used)))
    except UserError:
        return False


def _images(info: DatasetInfo, runtime: Runtime) -> Tensor:
    size = (2, info.channels, info.image_size, info.image_size)
    return runtime.take(torch.randn(size, generator=torch.Generator().manual_seed(0)))


def _train_copy(model: nn.Module, info: DatasetInfo, runtime: Runtime, where: str) -> Tensor:
    """Return the logits of a copy in training mode, after a backward pass and an evaluation."""
    images = _images(info, runtime)
    tried = copy_network(model).to(memory_format=runtime.memory_format).train()
    with seeded(0):
        output = tried(images)
        logits = main_output(output)
        _check_logits(logits, 2, info, f"{where}: in training mode")
        output_loss(output, torch.arange(2) % info.num_classes).backward()
        for optimizer in (SGD, AdamW):
            optimizer(tried.parameters(), lr=1e-3, weight_decay=1e-3).step()
        with torch.no_grad():
            tried.eval()(images)
    if unused_outputs(output):
        log.info("%s: gives more than logits in training; the loss is that of the logits alone", where)
    return logits.detach()


def _check_logits(output: object, images: int, info: DatasetInfo, where: str) -> None:
    if not (isinstance(output, Tensor) and output.shape == (images, info.num_classes)):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = "one image" if images == 1 else f"{images} images"
        raise UserError(f"{where}: must give logits of {images} x {info.num_classes} for {what}; gave {shape}")
