"""Connect the processes that ``torchrun`` has started, and disconnect them at the end."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist

from rethink_prune.errors import UserError, first_line
from rethink_prune.training.distributed import ALONE, POLL_INTERVAL, Processes

_TIMEOUT = timedelta(minutes=30)  # of a collective: more than a checkpoint takes on a slow file system
_GOODBYE_SECONDS = 10.0  # for the others to read the last message of the first process

# Kept here because Hydra calls the function that runs the study, and passes it the configuration alone.
_this_process = ALONE


def this_process() -> Processes:
    """Return this process as `connected` has found it, or `ALONE`.

    Examples
    --------
    >>> this_process().world
    1
    """
    return _this_process


@contextmanager
def connected(command: Sequence[str]) -> Iterator[Processes]:
    """Connect to the other processes; when the body of the first process ends, tell the others to end.

    Parameters
    ----------
    command : sequence of str
        The arguments of this process; all processes must have the same.

    Raises
    ------
    UserError
        If the processes cannot reach each other, or were started with different commands or versions.
    """
    rank, world = _read_variable("RANK"), _read_variable("WORLD_SIZE")
    if world == 1:
        yield ALONE
        return
    # torchrun keeps the store in a process of its own, which outlives the first process.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _open_store(world, serves=serves)
    local_rank, local_world, machine = map(_read_variable, ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"))
    processes = Processes(rank, world, local_rank, local_world, machine, store)
    _check_same_start(processes, command)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with processes.translate_connection_errors():
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=_TIMEOUT)
    global _this_process
    _this_process = processes
    try:
        yield processes
    finally:
        _this_process = ALONE
        # After an error as well, or the others would wait for ever.
        if processes.is_first:
            processes.end()
        if serves:
            _wait_for_goodbyes(processes)
    if not processes.is_first:
        processes.tell(f"goodbye/{rank}", True)
    dist.destroy_process_group()


def _open_store(world: int, *, serves: bool) -> dist.Store:
    address, port = os.environ.get("MASTER_ADDR", ""), _read_variable("MASTER_PORT")
    try:
        store = dist.TCPStore(address, port, world, serves, timeout=_TIMEOUT, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if serves:
            raise UserError(
                f"MASTER_PORT={port} cannot be used on this machine ({first_line(error)}); "
                "choose a free port: torchrun --master-port=29511, or torchrun --standalone on one machine"
            ) from error
        raise UserError(f"cannot reach the first process at {address}:{port} ({first_line(error)})") from error
    # After a restart by torchrun, the messages of the attempt before do not count.
    return dist.PrefixStore(f"rethink_prune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _check_same_start(processes: Processes, command: Sequence[str]) -> None:
    here = {"arguments": " ".join(command), **{name: version(name) for name in ("rethink-prune", "torch")}}
    if processes.is_first:
        processes.tell("started", here)
        return
    first = processes.wait_for("started")
    for name, value in here.items():
        if value != first[name]:
            raise UserError(
                f"process {processes.rank} of {processes.world} was started with other {name} than the first one: "
                f"{value!r} here, {first[name]!r} there; start all of them in the same way"
            )


def _wait_for_goodbyes(processes: Processes) -> None:
    # The messages are lost when the process that serves them ends, so the others need some time to read the last one.
    assert processes.store is not None
    deadline = time.monotonic() + _GOODBYE_SECONDS
    missing = [f"goodbye/{rank}" for rank in range(1, processes.world)]
    while not processes.store.check(missing) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)


def _read_variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value!r}: several processes have to be started by torchrun, which sets this variable")
    return int(value)
