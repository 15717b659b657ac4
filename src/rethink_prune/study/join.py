"""Studies that several processes train together: the first one runs the study, the others join in its trainings."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rethink_prune.config import StudyConfig
from rethink_prune.errors import UserError
from rethink_prune.study.keys import shared_by_processes
from rethink_prune.study.prepare import check_config, prepare_study
from rethink_prune.study.work import Order, train_stage
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.distributed import Processes
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.train import Diverged


def call_others(config: StudyConfig, processes: Processes) -> None:
    """Tell the other processes which study to join."""
    # As plain values: the classes of options may be in a module that the others have not imported yet.
    plain = config.model_dump(mode="json", serialize_as_any=True)
    # The others need no weights: these come with the start of a training.
    processes.order({**plain, "large": {**plain["large"], "checkpoint": None}})


def join_study(interrupts: Interrupts, processes: Processes) -> None:
    """Take part in every training of the study that the first process runs, if it runs one.

    Raises
    ------
    UserError
        If this machine cannot, or if it has other images than the first process's.
    """
    orders = processes.orders()
    plain: Mapping[str, Any] | None = next(orders, None)
    if plain is None:
        return
    study = prepare_study(check_config(plain), processes)
    order: Order
    for order in orders:
        for name, value in shared_by_processes(study.runtime.device.type, study.parts).items():
            if value != order.shared[name]:
                raise UserError(f"{name}: {value} here, {order.shared[name]} in the first process; all have to agree")
        assert order.spec.architecture is not None
        model = reshape(study.networks.large(), order.spec.architecture)
        # All processes see the same non-finite loss; the first one records it.
        with suppress(Diverged):
            train_stage(study, order.spec, model, interrupts)
