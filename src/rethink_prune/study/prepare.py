"""From a configuration to the parts of a study, with everything checked that can be wrong before any training."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rethink_prune.config import StudyConfig, parse_config
from rethink_prune.data import Epoch
from rethink_prune.errors import UserError
from rethink_prune.pruning import Pruner, PruneResult, Target, find_pruner
from rethink_prune.pruning.rounds import Rounds, plan_rounds
from rethink_prune.seeds import derive_generator, derive_seed, seeded
from rethink_prune.store.store import Store
from rethink_prune.study.arms import arm_of, draws_anew
from rethink_prune.study.budget import Budget
from rethink_prune.study.inputs import Inputs
from rethink_prune.study.keys import KeyParts, key_parts
from rethink_prune.study.networks import Networks, reference_macs
from rethink_prune.study.plan import StageSpec, needs_pruning, plan_content, plan_study
from rethink_prune.study.pretrained import Checkpoint, read_checkpoint
from rethink_prune.study.transfer import Transfer, plan_transfer, transfer_entries
from rethink_prune.study.trial import try_training
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.runtime import Runtime, prepare_runtime

_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
# Asked as soon as this is imported: torch sets the variable itself when it first looks.
_COMPILED_IS_CHOSEN = _COMPILED in os.environ


@dataclass(frozen=True)
class PreparedStudy:
    """The parts of a study; they fit each other, the images and this machine.

    Attributes
    ----------
    init : str, optional
        Name of the initialiser; None where the network's modules reset themselves.
    rounds : Rounds
        What is to go from the unpruned network, in one step or several.
    given : Checkpoint, optional
        Weights of the unpruned network that the user brought.
    transfer : Transfer, optional
        What the networks are transferred to.
    """

    config: StudyConfig
    processes: Processes
    runtime: Runtime
    store: Store
    inputs: Inputs
    networks: Networks
    init: str | None
    pruner: Pruner
    rounds: Rounds
    given: Checkpoint | None
    budget: Budget
    transfer: Transfer | None = None

    @property
    def target(self) -> Target:
        """What is to go from the unpruned network in all."""
        return self.rounds.target

    def plan(self) -> tuple[StageSpec, ...]:
        """Return the stages of the study."""
        return plan_study(
            self.budget,
            self.config.arms,
            self.rounds,
            between=self.config.pruner.between_rounds,
            trains_sparse=self.pruner.trains_sparse,
            at_start=self.pruner.at_start,
            baseline=self.config.large.baseline or (self.transfer is not None and self.transfer.needs_large),
            given=self.given is not None,
        )

    def plan_transfer(self, arms: Sequence[StageSpec], pruned: Architecture | None) -> tuple[StageSpec, ...]:
        """Return the detection stages, if there are any; `pruned` is what pruning leaves, if that is known."""
        if self.transfer is None:
            return ()
        return plan_transfer(self.transfer, lambda left: reshape(self.networks.large(), left), arms, pruned)

    def full_plan(self) -> tuple[tuple[StageSpec, ...], tuple[StageSpec, ...], dict[str, Any]]:
        """Return the stages, those of detection, and the content of ``plan.json``."""
        stages = self.plan()
        detection = self.plan_transfer(stages, self.target.known_architecture if self.target.known else None)
        sparse = self.pruner.trains_sparse
        content = plan_content(self.budget, stages, self.target, trains_sparse=sparse, detection=detection)
        return stages, detection, content

    def prune_with(self, pruner: Pruner, model: nn.Module, target: Target, *purpose: int) -> PruneResult:
        """Have a network pruned: on the images of the first epoch, in its order, with the draws of a purpose."""
        seed = self.config.seed
        with seeded(derive_seed(seed, "prune", *purpose)):
            return pruner.prune(
                model.eval(),
                target,
                data=Epoch(self.inputs.train_batches, 0),
                generator=derive_generator(seed, "prune", *purpose),
            )

    @cached_property
    def parts(self) -> KeyParts:
        """What the keys of the stages are made of; reads the images, whose fingerprint they hold."""
        return key_parts(self.config, self.inputs, self.networks, self.init, self.pruner, self.rounds, self.given)


def check_config(tree: Mapping[str, Any]) -> StudyConfig:
    """Validate a composed and resolved configuration against the pruners and arms there are.

    Raises
    ------
    UserError
        With one line for each error.
    """
    return parse_config(tree, pruner_options=lambda name: find_pruner(name).options_type, check_arm=arm_of)


def prepare_study(config: StudyConfig, processes: Processes = ALONE) -> PreparedStudy:
    """Find the parts of a study, and check that they fit.

    Parameters
    ----------
    config : StudyConfig
    processes : Processes
        Those that train together.

    Raises
    ------
    UserError
        If the parts of the configuration do not fit each other, the data or the machine.
    """
    _check_batch_size(config.recipe.batch_size, processes.world)
    store = Store(Path(config.store.root))
    runtime = replace(
        prepare_runtime(config.device, config.precision, deterministic=config.deterministic, processes=processes),
        accelerate=config.accelerate,
        checkpoint_seconds=config.store.checkpoint_seconds,
        show_progress=sys.stderr.isatty() and processes.is_first,
    )
    if not _COMPILED_IS_CHOSEN:
        # What torch.compile makes is kept for other processes; elsewhere, a system clears it away. Not before torch has
        # looked, which makes the folder: a store that cannot be used is refused further down.
        os.environ[_COMPILED] = str(store.cache / "compiled")
    inputs = Inputs(config.dataset, config.recipe, config.seed, runtime, processes, store.cache)
    pruner = find_pruner(config.pruner.name)(config.pruner)
    pruner.seed = config.seed
    _check_arms_fit(config.arms, pruner)
    networks = Networks(config.model, inputs.info, config.seed)
    model = networks.large()
    runtime = networks.check(model, runtime, draws_anew=draws_anew(config.arms))
    rounds = plan_rounds(pruner, model, torch.zeros(1, *inputs.image_shape), config.model.name)
    target = rounds.target
    if networks.is_own:
        pruned = reshape(model, target.rehearsal())
        try_training(pruned, inputs.info, runtime, f"model.name={config.model.name}: pruned")
    if needs_pruning(target, config.arms):
        pruner.check_images(target, inputs.info.train_images)
    source = config.large.checkpoint
    given = None if source is None else read_checkpoint(source, model, config.model.name)
    reference = config.budget.reference_model
    budget = Budget(
        recipe=config.recipe,
        rule=config.budget,
        large=target.full_cost,
        macs_reference=target.full_cost.macs if reference is None else reference_macs(reference, inputs.info),
        train_images=inputs.info.train_images,
        trains_sparse=pruner.trains_sparse,
        rewind=config.rewind,
    )
    if given is not None and not pruner.at_start:
        _check_start_is_known(config)
    transfer = None
    if config.transfer is not None:
        entries = transfer_entries(config.transfer, config.arms)
        transfer = Transfer(config.transfer, entries, inputs.image_shape, Path("datasets"))
        transfer.check(networks.large(), pruner, target)
    store.check()
    init = networks.init_of(model)
    return PreparedStudy(
        config, processes, runtime, store, inputs, networks, init, pruner, rounds, given, budget, transfer
    )


def _check_arms_fit(arms: Sequence[str], pruner: Pruner) -> None:
    """Raise `UserError` if an arm needs weights of a pruner that leaves none."""
    refused = [name for name in arms if pruner.fresh_only and arm_of(name).follows_training]
    if refused:
        fit = [name for name in arms if name not in refused] or ["scratch_e", "scratch_b"]
        raise UserError(
            f"pruner={pruner.options.name}: has fresh weights only, and {refused[0]} needs inherited ones; "
            f"take arms=[{','.join(fit)}]"
        )


def _check_start_is_known(config: StudyConfig) -> None:
    """Raise `UserError` if something needs the weights that a network had before the user brought it."""
    early = [name for name in config.arms if arm_of(name).weights in ("initial", "early")]
    between = config.pruner.between_rounds
    needs = f"arms={early[0]}" if early else f"pruner.between_rounds={between}"
    if early or (config.pruner.rounds and between != "none"):
        raise UserError(
            f"{needs}: needs the weights that the unpruned network started from, which large.checkpoint does not hold; "
            f"leave large.checkpoint out" + ("" if early else ", or take pruner.between_rounds=none")
        )


def _check_batch_size(batch_size: int, processes: int) -> None:
    # Batch norm needs two images in every process.
    if processes > 1 and batch_size < 2 * processes:
        raise UserError(
            f"recipe.batch_size={batch_size}: too few for {processes} processes, which need "
            f"two images each; start at most {max(1, batch_size // 2)}"
        )
