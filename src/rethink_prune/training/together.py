"""Several trainings at once in one process, on one device.

A step on a GPU is launched, and computed while Python goes on. A small training leaves most of a GPU idle, so the next
one launches its own step meanwhile, on a stream of its own, and both are computed side by side. Python itself does one
step after the other (:mod:`rethink_prune.turns`). So what the steps share, such as the global generators of random
numbers, is as it would be for each training alone, and so are the results.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch

from rethink_prune.data.batches import TrainBatches
from rethink_prune.data.streamed_images import StreamedImages
from rethink_prune.errors import Interrupted, UserError, first_line
from rethink_prune.training.distributed import Processes
from rethink_prune.turns import do_in_turns, number_at_once

log = logging.getLogger(__name__)

# As many as were measured on a card: five small networks take about twice the time of one.
MOST_AT_ONCE = 5
Made = TypeVar("Made")


class NeedsDevice(Exception):
    """Raised by work that cannot share the device with other work; it is done again alone."""


# What is done again after the others, alone.
ALONE_ONLY = (torch.OutOfMemoryError, NeedsDevice)


def arms_at_once(
    together: int | Literal["auto"], device: torch.device, processes: Processes, batches: TrainBatches
) -> int:
    """Return how many arms of a study train at once.

    Parameters
    ----------
    together : int or "auto"
        With ``auto``, those of a process that trains alone on a GPU, with images that are kept there.
    device : torch.device
    processes : Processes
        Those that train together, one training after the other.
    batches : TrainBatches
        Of their images. Those that are read from files keep a GPU busy with one training.

    Raises
    ------
    UserError
        If more than one is asked for where only one is possible.
    NeedsDevice
        If only one is possible, and whole studies take turns.
    """
    alone = "torchrun's processes train one network at a time" if processes.world > 1 else None
    if isinstance(batches.images, StreamedImages):
        alone = "images that are read from files feed one training at a time"
    if number_at_once() > 1:
        if alone is not None:
            raise NeedsDevice(alone)
        return 1  # whole studies take turns already
    if together == "auto":
        return MOST_AT_ONCE if device.type == "cuda" and alone is None else 1
    if together > 1 and alone is not None:
        raise UserError(f"together={together}: {alone}; leave together out")
    return together


def train_together(trainings: Sequence[Callable[[], Made]], *, at_once: int, device: torch.device) -> list[Made]:
    """Do all trainings, some at once, and return what each has made.

    An error ends the training that raises it; the others go on to their ends before it is raised. A training that finds
    no room on the device beside others, or cannot share it, is done again after them, alone: it goes on from its
    checkpoint.

    Parameters
    ----------
    trainings : sequence of callable
    at_once : int
        As many of them at once; with 1, each is done in this thread after the one before.
    device : torch.device
        On CUDA, each has a stream of its own there.

    Raises
    ------
    Interrupted
        After a signal, when all have ended.

    Examples
    --------
    >>> train_together([lambda: "a", lambda: "b"], at_once=2, device=torch.device("cpu"))
    ['a', 'b']
    """
    if at_once == 1 or len(trainings) < 2:
        return [training() for training in trainings]
    ready = torch.cuda.current_stream(device) if device.type == "cuda" else None
    works = [partial(_on_own_stream, training, ready) for training in trainings]
    # Imported here: in a notebook, this warns of missing widgets.
    from tqdm.contrib.logging import logging_redirect_tqdm

    # Lines of the log go above the bars of all trainings, whichever ends first.
    with logging_redirect_tqdm():
        outcomes = do_in_turns(works, at_once=at_once)
        stopped = any(isinstance(outcome, Interrupted) for outcome in outcomes)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ALONE_ONLY) and not stopped:
                log.warning("not beside others, going on alone: %s", first_line(outcome))
                gc.collect()  # networks of trainings that have ended can be in cycles
                try:
                    outcomes[number] = works[number]()
                except Exception as error:
                    outcomes[number] = error
    _raise_first([outcome for outcome in outcomes if isinstance(outcome, BaseException)])
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _on_own_stream(training: Callable[[], Made], ready: torch.cuda.Stream | None) -> Made:
    if ready is None:
        return training()
    stream = torch.cuda.Stream(ready.device)
    # What all share, such as the images, may still be on its way to the device.
    stream.wait_stream(ready)
    with torch.cuda.device(ready.device), torch.cuda.stream(stream):
        try:
            return training()
        finally:
            stream.synchronize()


def _raise_first(errors: Sequence[BaseException]) -> None:
    # A signal ended all of them: it comes before what failed until then.
    for error in sorted(errors, key=lambda error: not isinstance(error, Interrupted)):
        for other in errors:
            if other is not error and not isinstance(other, Interrupted):
                log.error("%s", other, exc_info=None if isinstance(other, UserError) else other)
        raise error
