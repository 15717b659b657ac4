"""A study: one dataset, model, pruner, budget and seed, run through its arms.

Read :func:`run_study` top to bottom: large -> (sparse) -> prune, at once or in rounds -> arms -> (transfer) -> summary.
`plan.py` lists the stages, `keys.py` says what each one's result depends on, `work.py` does them, and `stages.py` runs
one: it comes from the store if its key is there, and is computed otherwise. Where several processes train together, the
others run :func:`join_study`.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rethink_prune.config import StudyConfig
from rethink_prune.errors import UserError
from rethink_prune.files import check_folder, write_json
from rethink_prune.store.stage import Done, Failed
from rethink_prune.study.compose import Study
from rethink_prune.study.keys import add_keys, shared_by_processes
from rethink_prune.study.plan import StageSpec, plan_arms, plan_between
from rethink_prune.study.prepare import PreparedStudy, check_config, prepare_study
from rethink_prune.study.stages import Runner
from rethink_prune.study.summary import Summary
from rethink_prune.study.tables import plan_text
from rethink_prune.study.work import Order, pruned_network, shuffled_architecture, train_stage
from rethink_prune.surgery.cut import reshape
from rethink_prune.tracking.sender import Trackers
from rethink_prune.training.distributed import ALONE, Processes
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.training.runtime import describe_device
from rethink_prune.training.together import arms_at_once, train_together
from rethink_prune.training.train import Diverged

log = logging.getLogger(__name__)


def run_study(
    config: Study | StudyConfig,
    run_dir: Path | str,
    interrupts: Interrupts | None = None,
    *,
    experiment: str | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Run a study and return its summary.

    What the store has already is not computed again. Ctrl-C, or SIGTERM, saves and stops it: the same call goes on.

    Parameters
    ----------
    config : Study or StudyConfig
        A study, or its validated configuration.
    run_dir : Path or str
        Gets ``plan.json``, ``summary.json``, ``summary.md`` and ``tensorboard/``.
    interrupts : Interrupts, optional
        Tells when to stop, where the caller listens for signals already.
    experiment : str, optional
        Name of the experiment file, for the summary; a `Study` knows its own.
    processes : Processes
        Those that train together; the others run `join_study`.

    Returns
    -------
    dict
        The content of ``summary.json``; of ``plan.json`` in a dry run.

    Raises
    ------
    UserError
        If something does not fit, before any training; or at the end, if an arm failed.
    KeyboardInterrupt
        At a signal, when everything is saved.
    """
    if isinstance(config, Study):
        experiment, config = config.experiment, config.config
    if not isinstance(config, StudyConfig):
        raise UserError(f"run_study: takes a Study, such as Study({{'pruner.ratio': 0.3}}), and not {config!r}")
    if interrupts is None:
        with Interrupts() as listening:
            return run_study(config, run_dir, listening, experiment=experiment, processes=processes)
    run_dir = Path(run_dir)
    check_folder(run_dir, f"run_dir={run_dir}")
    # Everything that can be wrong is found here, before anything is trained or written.
    study = prepare_study(config, processes)
    for warning in study.target.report().warnings:
        log.warning(warning)
    stages, detection, plan = study.full_plan()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "plan.json", plan)
    if config.dry_run:
        print(plan_text(plan))
        return plan

    _call_others(config, processes)
    study.store.prepare()
    auto = " (auto)" if config.precision == "auto" else ""
    log.info("%s, precision %s%s", describe_device(study.runtime.device), study.runtime.precision, auto)
    planned = {spec.title: spec for spec in add_keys(stages, study.parts, {})}
    at_once = arms_at_once(config.together, study.runtime.device, processes, study.inputs.train_batches)
    summary = Summary(run_dir, study, experiment)
    described, kept = summary.content["study"], study.store.root / "trackers"
    with Trackers(config.tracker, kept, study=described, runs=run_dir) as trackers:
        runner = Runner(study, run_dir, interrupts, [*planned.values(), *detection], trackers)
        _run_planned(study, planned, runner, summary, at_once)
    return summary.content


def _run_planned(
    study: PreparedStudy, planned: Mapping[str, StageSpec], runner: Runner, summary: Summary, at_once: int
) -> None:
    """Run the stages of a study; `planned` has those that are known before pruning, by title."""
    config = study.config
    done: dict[str, Done] = {}

    def run(spec: StageSpec) -> Done | Failed:
        parents = tuple(done[title] for title in spec.needs if title in done)
        summary.begin(spec, parents)
        outcome = runner.run(spec, parents)
        if isinstance(outcome, Done):
            done[spec.title] = outcome
        return outcome

    # The unpruned network, trained plainly, and by some pruners also their own way; for tickets, its first epochs.
    for title in ("large", "sparse", "early"):
        if title in planned:
            summary.add_base(title, run(planned[title]))

    # Pruning, in rounds or at once, of what was trained last. A training that failed leaves nothing to prune.
    for spec in planned.values():
        if spec.kind != "prune" or (spec.parent is not None and spec.parent not in done):
            continue
        (spec,) = add_keys([spec], study.parts, _stage_names(done))
        outcome = run(spec)
        assert isinstance(outcome, Done), "only trainings can fail"
        summary.record_stage(spec.title, outcome)
        if spec.title != "prune":
            # The round is known by now, and so is the training that follows it.
            left = pruned_network(study, done[spec.title])
            between = plan_between(study.budget, spec.round, config.pruner.between_rounds, left.architecture, left.cost)
            (between,) = add_keys([between], study.parts, _stage_names(done))
            runner.replan([between])
            summary.add_round(spec.round, done, run(between))
        elif spec.round > 1:
            summary.add_round(spec.round, done, None)
    pruned = pruned_network(study, done.get("prune"))
    summary.add_pruned(pruned, study.budget.ledger(pruned.cost) if pruned.cost else {}, done.get("prune"))

    # The arms. What was not known before pruning is planned now.
    shuffled = shuffled_architecture(study, pruned)
    arms = plan_arms(study.budget, config.arms, pruned.architecture, pruned.cost, shuffled=shuffled)
    arms = add_keys(arms, study.parts, _stage_names(done))
    detection = study.plan_transfer(arms, pruned.architecture)
    runner.replan([*arms, *detection])
    if pruned.cost is not None and not study.target.known:
        lengths = ", ".join(f"{spec.title} {spec.optimizer.epochs} epochs" for spec in arms if spec.optimizer)
        log.info("pruned: %s parameters, %.4g MACs; %s", f"{pruned.cost.params:,}", pruned.cost.macs, lengths)

    def run_arm(spec: StageSpec) -> None:
        outcome = run(spec)
        for name in spec.names:
            summary.add_arm(name, outcome)

    train_together([partial(run_arm, spec) for spec in arms], at_once=at_once, device=study.runtime.device)

    # What these networks are worth as the start of a detector.
    for spec in detection:
        # Imported here and below: torchvision is slow to import, and most studies have no second task.
        from rethink_prune.study.detect import run_detection

        summary.add_transfer(spec.title, run_detection(study, spec, done, run))
    summary.finish()


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
        if order.spec.kind == "detect":
            from rethink_prune.study.detect import join_detection_stage

            with suppress(Diverged):
                join_detection_stage(study, order.spec, interrupts)
            continue
        model = reshape(study.networks.large(), order.spec.architecture)
        teacher = study.networks.large() if order.spec.teacher else None
        # All processes see the same non-finite loss; the first one records it.
        with suppress(Diverged):
            train_stage(study, order.spec, model, interrupts, teacher=teacher)


def _stage_names(done: Mapping[str, Done]) -> dict[str, str]:
    return {title: outcome.stage.name for title, outcome in done.items()}


def _call_others(config: StudyConfig, processes: Processes) -> None:
    """Tell the other processes which study to join."""
    # As plain values: the classes of options may be in a module that the others have not imported yet.
    plain = config.model_dump(mode="json", serialize_as_any=True)
    # The others need no weights: these come with the start of a training.
    processes.order({**plain, "large": {**plain["large"], "checkpoint": None}})
