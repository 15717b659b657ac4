"""Processes that train together: how they connect, who they are, and how they agree.

The first process (rank 0) runs the study, and it alone touches the store of stages. The others wait for a training to
take part in. This may take hours, while another job trains what this one needs, so they look into torch's key-value
store again and again; collectives are for trainings that all processes are in.

When another process dies, whatever waits for it fails. Call `max`, `sum` and `share_state` inside
`translate_connection_errors`; the other methods do so themselves.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rethink_prune.data.batches import Shard
from rethink_prune.errors import UserError, first_line

Value = TypeVar("Value")

_POLL_INTERVAL = 0.2  # seconds between two looks into the key-value store
# Steps between two looks at whether any process has to stop: at each look the fastest process waits for the slowest.
_STEPS_TOGETHER = 8
_TIMEOUT = timedelta(minutes=30)  # of a collective: more than a checkpoint takes on a slow file system
_GOODBYE_SECONDS = 10.0  # for the others to read the last message of the first process


@dataclass
class Processes:
    """One of the processes that train together, and its way to the others; by default there are no others.

    Attributes
    ----------
    rank, world : int
        Its number, and how many there are.
    local_rank, local_world : int
        The same on this machine.
    machine : int
        This machine's number.
    store : torch.distributed.Store, optional
        Where the processes leave messages for each other.

    Examples
    --------
    >>> alone = Processes()
    >>> alone.is_first, alone.shard, alone.max(3, 0), alone.broadcast("weights")
    (True, Shard(rank=0, world=1), [3, 0], 'weights')
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    machine: int = 0
    store: dist.Store | None = None
    _orders: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process runs the study."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """Its part of the images."""
        return Shard(self.rank, self.world)

    @property
    def steps_together(self) -> int:
        """After every how many steps of an epoch the processes ask each other whether to stop."""
        return _STEPS_TOGETHER if self.world > 1 else 1

    def tell(self, key: str, value: Any) -> None:
        """Leave a message (a JSON-able value) for the other processes."""
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """Return the message that another process leaves under a key, however long that takes."""
        assert self.store is not None
        with self.translate_connection_errors():
            while not self.store.check([key]):
                time.sleep(_POLL_INTERVAL)
            return json.loads(self.store.get(key))

    def order(self, what: Any) -> None:
        """Tell the other processes what to do next, by an object that can be pickled."""
        # Broadcast only after the message: the others may wait longer for an order than a collective is allowed to.
        self.tell(f"order/{self._orders}", True)
        self._orders += 1
        self.broadcast(what)

    def end(self) -> None:
        """Tell the other processes that there is nothing more to do."""
        self.tell(f"order/{self._orders}", False)

    def orders(self) -> Iterator[Any]:
        """Yield what the first process orders, until it ends."""
        while self.wait_for(f"order/{self._orders}"):
            self._orders += 1
            yield self.broadcast(None)

    def one_after_another(self, load: Callable[[], Value]) -> Value:
        """Load what is kept on a machine's disk: one process of every machine first, then the others."""
        # The first one may download or unpack, and the others would do it at the same time.
        key = f"loaded/{self.machine}"
        if self.local_rank > 0:
            self.wait_for(key)
        value = load()
        if self.local_rank == 0:
            self.tell(key, True)
        return value

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value on all processes."""
        if self.world == 1:
            return value
        # Through the CPU's backend: pickled objects need no memory of a GPU.
        box = [value]
        with self.translate_connection_errors():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in their order, on every one of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.translate_connection_errors():
            dist.all_gather_object(found, value)
        return found

    def max(self, *values: int) -> list[int]:
        """Return, value by value, the largest of any process."""
        if self.world == 1:
            return list(values)
        # A tensor on the CPU: with one on CUDA the host would wait for all kernels before it.
        largest = torch.tensor(values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def share_state(self, model: nn.Module) -> None:
        """Give all processes the first one's weights and running statistics."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def share_norms(self, model: nn.Module, device: torch.device) -> None:
        """Replace batch norms, in place, by those that normalise over the batches of all processes; on CUDA only."""
        if self.world == 1 or device.type != "cuda":
            return
        for name, module in list(model.named_modules()):
            # The exact class: a subclass may do more than batch normalisation, and a replacement would lose that.
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))

    def wrap(self, model: nn.Module, device: torch.device, *, static: bool) -> nn.Module:
        """Return the network to call in training: its backward pass gives every process the mean of all gradients.

        Parameters
        ----------
        model : torch.nn.Module
            On the device. Takes over the first process's weights.
        static : bool
            Assume that every step uses the same parameters as the first, which is faster; not with ``torch.compile``.
        """
        if self.world == 1:
            return model
        with self.translate_connection_errors(), warnings.catch_warnings():
            self.share_state(model)
            # PyTorch 2.15 has another name for `broadcast_buffers`, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            devices = [device] if device.type == "cuda" else None
            # Buffers (running statistics) are read at the end of an epoch alone, where `share_state` sends them.
            return DistributedDataParallel(
                model, devices, broadcast_buffers=False, static_graph=static, find_unused_parameters=not static
            )

    @contextmanager
    def translate_connection_errors(self) -> Iterator[None]:
        """Raise `UserError` where the body fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not is_connection_error(error):
                raise
            raise UserError(
                f"process {self.rank} of {self.world}: another process of this training is gone; nothing finished is "
                "lost: run the same command again, with any number of processes, to go on"
            ) from error


ALONE = Processes()
# Kept here because Hydra calls the function that runs the study, and passes it the configuration alone.
_this_process = ALONE


def is_connection_error(error: RuntimeError) -> bool:
    """Tell whether an error is that of a connection to another process.

    Examples
    --------
    >>> is_connection_error(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    True
    """
    # Errors of gloo, the backend for CPUs, are plain RuntimeErrors: only the message tells.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


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
        time.sleep(_POLL_INTERVAL)


def _read_variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value!r}: several processes have to be started by torchrun, which sets this variable")
    return int(value)
