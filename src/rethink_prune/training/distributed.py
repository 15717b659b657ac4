"""Processes that train together, as ``torchrun`` starts them: who they are, and how they agree.

The first process (rank 0) runs the study, and it alone touches the store. The others wait for a training to take part
in. Waiting may take hours, while another job trains what this one needs, so it is done by looking into torch's
key-value store again and again; collectives are for trainings that all processes are in.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rethink_prune.data.shard import Shard
from rethink_prune.errors import UserError

Value = TypeVar("Value")

POLL_SECONDS = 0.2
# Steps between two looks at whether any process has to stop: each costs the fastest one a wait for the slowest.
_STEPS_TOGETHER = 8
_TIMEOUT = timedelta(minutes=30)  # of a collective: more than a checkpoint takes on a slow file system
_GOODBYE_SECONDS = 10.0
_END = "end"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
        Where the first process leaves word for the others.
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
        """Every how many steps `most` may be asked within an epoch."""
        return _STEPS_TOGETHER if self.world > 1 else 1

    def tell(self, key: str, value: Any) -> None:
        """Leave word (a JSON-able value) for the other processes."""
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """Return what another process has left under a key, however long that takes."""
        assert self.store is not None
        with self.explained():
            while not self.store.check([key]):
                time.sleep(POLL_SECONDS)
            return json.loads(self.store.get(key))

    def check_same(self, here: Mapping[str, str]) -> None:
        """Raise `UserError` if this process was started in another way than the first one."""
        if self.is_first:
            self.tell("started", dict(here))
            return
        first = self.wait_for("started")
        for name, value in here.items():
            if value != first[name]:
                raise UserError(
                    f"process {self.rank} of {self.world} was started with other {name} than the first one: "
                    f"{value!r} here, {first[name]!r} there; start all of them in the same way"
                )

    def order(self, what: Any) -> None:
        """Tell the other processes what to do next, by an object that can be pickled."""
        self._announce("order")
        self.broadcast(what)

    def end(self) -> None:
        """Tell the other processes that there is nothing more to do."""
        self._announce(_END)

    def wait_for_goodbyes(self) -> None:
        """Give the other processes time to read what was left for them, before this one ends and it is gone."""
        assert self.store is not None
        deadline = time.monotonic() + _GOODBYE_SECONDS
        missing = [f"goodbye/{rank}" for rank in range(1, self.world)]
        while not self.store.check(missing) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _announce(self, what: str) -> None:
        self.tell(f"order/{self._orders}", what)
        self._orders += 1

    def orders(self) -> Iterator[Any]:
        """Yield what the first process orders, until it ends."""
        while self.wait_for(f"order/{self._orders}") != _END:
            self._orders += 1
            yield self.broadcast(None)

    def one_after_another(self, load: Callable[[], Value]) -> Value:
        """Load what is kept on a machine's disk: one process of every machine first, then the others."""
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
        box = [value]
        with self.explained():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def most(self, *values: int) -> list[int]:
        """Return, value by value, the largest of any process."""
        if self.world == 1:
            return list(values)
        found = torch.tensor(values)
        with self.explained():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        with self.explained():
            dist.all_reduce(total)
        return total

    def share_state(self, model: nn.Module) -> None:
        """Give all processes the first one's weights and running statistics."""
        if self.world > 1:
            with self.explained():
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def share_norms(self, model: nn.Module, device: torch.device) -> None:
        """Have batch norms normalise by the batches of all processes, in place, where the device can (CUDA)."""
        if self.world == 1 or device.type != "cuda":
            return
        for name, module in list(model.named_modules()):
            if type(module) in _NORMS:  # exact: a subclass may do something that would be lost
                model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))

    def wrap(self, model: nn.Module, device: torch.device, *, static: bool) -> nn.Module:
        """Return the network's forward pass, after whose backward pass all processes have the mean gradients.

        Parameters
        ----------
        model : torch.nn.Module
            On the device. Takes over the first process's weights.
        device : torch.device
        static : bool
            Take it that every step is like the first, which costs less. Not for what will be compiled.
        """
        if self.world == 1:
            return model
        self.share_state(model)
        with self.explained(), warnings.catch_warnings():
            # Evaluation alone reads the buffers. PyTorch 2.15 has another name for it, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                static_graph=static,
                find_unused_parameters=not static,
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say so where the body fails because another process is gone.

        Raises
        ------
        UserError
            Instead of whatever the connection to the other process raised.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not is_lost(error):
                raise
            raise UserError(
                f"process {self.rank} of {self.world}: another process of this training is gone; nothing finished is "
                "lost: run the same command again, with any number of processes, to go on"
            ) from error


ALONE = Processes()
_this_process = ALONE


def this_process() -> Processes:
    """Return this process as `connected` has found it, or `ALONE`."""
    return _this_process


@contextmanager
def connected(command: Sequence[str]) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started, and when the body of the first one ends, let the others end.

    Parameters
    ----------
    command : sequence of str
        The arguments of this process, which have to be those of all.

    Raises
    ------
    UserError
        If the processes cannot reach each other, or were started with different commands or versions.
    """
    rank, world = _variable("RANK"), _variable("WORLD_SIZE")
    if world == 1:
        yield ALONE
        return
    # torchrun keeps the store in a process of its own, which outlives the first process.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _open_store(world, serves=serves)
    processes = Processes(
        rank=rank,
        world=world,
        local_rank=_variable("LOCAL_RANK"),
        local_world=_variable("LOCAL_WORLD_SIZE"),
        machine=_variable("GROUP_RANK"),
        store=store,
    )
    processes.check_same({"arguments": " ".join(command), **_versions()})
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with processes.explained():
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=_TIMEOUT
        )
    global _this_process
    _this_process = processes
    try:
        yield processes
    finally:
        _this_process = ALONE
        if processes.is_first:
            processes.end()
        if serves:
            processes.wait_for_goodbyes()
    if not processes.is_first:
        processes.tell(f"goodbye/{rank}", True)
    dist.destroy_process_group()


def _open_store(world: int, *, serves: bool) -> dist.Store:
    address, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT")
    try:
        store = dist.TCPStore(address, port, world, serves, timeout=_TIMEOUT, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if serves:
            raise UserError(
                f"MASTER_PORT={port} cannot be used on this machine ({_first_line(error)}); "
                "choose a free port: torchrun --master-port=29511, or torchrun --standalone on one machine"
            ) from error
        raise UserError(f"cannot reach the first process at {address}:{port} ({_first_line(error)})") from error
    # After a restart by torchrun, what was left before does not count.
    return dist.PrefixStore(f"rethink_prune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("rethink-prune", "torch")}


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value!r}: several processes have to be started by torchrun, which sets this variable")
    return int(value)


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error is that of a connection to another process."""
    # Gloo's errors have no class of their own.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
