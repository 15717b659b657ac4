"""``summary.json`` and ``summary.md`` of a study, and the table in the terminal."""

import platform
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rethink_prune.config import TARGET_OPTIONS
from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically, write_json
from rethink_prune.pruning.channel_pruner import ChannelTarget
from rethink_prune.store.stage import Done, Failed, total_flops
from rethink_prune.study.arms import arm_of, draws_anew
from rethink_prune.study.keys import settings, stage_name
from rethink_prune.study.plan import StageSpec
from rethink_prune.study.prepare import PreparedStudy
from rethink_prune.study.tables import rounds_table, study_table, transfer_table
from rethink_prune.study.transfer import entry_of
from rethink_prune.study.work import PrunedNetwork
from rethink_prune.tracking.tensorboard import write_study
from rethink_prune.training.runtime import describe_device

_PACKAGES = ("rethink-prune", "torch", "torchvision", "numpy", "hydra-core")


class Summary:
    """The summary of a run, rewritten after every stage.

    Parameters
    ----------
    run_dir : Path
        Where it is written.
    study : PreparedStudy
        Its store gets a record of which run uses which stages, and a copy of the summary.
    experiment : str, optional
        Name of the experiment file.
    """

    def __init__(self, run_dir: Path, study: PreparedStudy, experiment: str | None) -> None:
        self.run_dir = run_dir
        self.study = study
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        self.content: dict[str, Any] = {"study": describe_study(study, experiment)}
        self._stages: dict[str, str] = {}
        # What the pruned network's widths had to be found by.
        self._search: Done | None = None
        self._write()

    def begin(self, spec: StageSpec, parents: Sequence[Done]) -> None:
        """Record a training that starts now, under ``unfinished``: where its metrics grow, and what it will cost.

        Parameters
        ----------
        spec : StageSpec
        parents : sequence of Done
            The stages it needs.
        """
        if spec.key is None or spec.optimizer is None or spec.train_flops is None:
            return
        before = total_flops(parents)
        self.content.setdefault("unfinished", {})[spec.title] = {
            "status": "unfinished",
            "epochs": spec.optimizer.epochs,
            "train_flops": spec.train_flops,
            "train_flops_total": None if before is None else before + spec.train_flops,
            "stage": str(self.study.store.stage(stage_name(spec.kind, spec.key)).folder),
        }
        self._write()

    def record_stage(self, title: str, outcome: Done) -> None:
        """Record that this run uses a stage, at once: a run that is killed wants it again."""
        self._stages[title] = outcome.stage.name
        self._write()

    def add_base(self, name: str, outcome: Done | Failed) -> None:
        """Add the unpruned network as trained plainly (``large``), by the pruner (``sparse``), or ``early``."""
        self.content[name] = self._entry(name, outcome)
        if name == "sparse":
            large, sparse = self.content.get("large", {}), self.content["sparse"]
            self.content["study"]["warnings"] += collapse_warning(large, sparse, strength=self._strength)
        self._write()

    def add_round(self, number: int, done: Mapping[str, Done], trained: Done | Failed | None) -> None:
        """Add a round of pruning, and the training that followed it.

        Parameters
        ----------
        number : int
            From 1.
        done : mapping of str to Done
            The stages so far.
        trained : Done or Failed or None
            None for the last round, which the arms follow.
        """
        title = "prune" if trained is None else f"prune_{number}"
        prune = done[title]
        between = {} if trained is None else self._entry(f"round_{number}", trained)
        if between.get("status") == "failed":
            self.content["study"]["warnings"].append(f"the training after round {number} failed: {between['reason']}")
        layers = prune.result["report"]["layers"]
        by_channel = isinstance(self.study.target, ChannelTarget)
        entry = {
            "round": number,
            "params": prune.result["params"],
            "weights": prune.result["params"],
            "channels": sum(layer["kept"] for layer in layers) if by_channel else None,
            "macs": prune.result["macs"],
            "top1_before": prune.parents[0].result["top1"],
            "top1": prune.result["top1"],
            "top1_recalibrated": prune.result["top1_recalibrated"],
            "top1_trained": between.get("top1"),
            "epochs": between.get("epochs", 0),
            "train_flops": between.get("train_flops", 0),
            "stage": str(prune.stage.folder),
            "trained_stage": between.get("stage"),
        }
        self.content.setdefault("rounds", []).append(entry)
        self._write()

    def add_pruned(self, pruned: PrunedNetwork, ledger: Mapping[str, Any], done: Done | None) -> None:
        """Add the pruned network before any retraining, and how the budget was worked out from it.

        Parameters
        ----------
        pruned : PrunedNetwork
        ledger : mapping
            The budget's rule and numbers.
        done : Done, optional
            The prune stage, if there is one.
        """
        entry: dict[str, Any] = asdict(pruned.cost) if pruned.cost else {"params": None, "macs": None}
        if done is not None:
            shown = ("top1", "top1_recalibrated", "top5", "loss", "peak_memory_bytes")
            entry.update({name: done.result[name] for name in shown if name in done.result})
            entry["stage"] = str(done.stage.folder)
            self._search = None if self.study.target.known else done
        entry.update(layers=list(pruned.report["layers"]), frozen=dict(pruned.report["frozen"]))
        self.content["pruned"] = entry
        self.content["study"]["warnings"] += list(pruned.report["warnings"])
        self.content["study"]["ledger"] = dict(ledger)
        self.content["arms"] = {}
        self._write()

    def add_arm(self, name: str, outcome: Done | Failed) -> None:
        """Add one arm."""
        entry = self._entry(name, outcome)
        if isinstance(outcome, Done):
            # Fine-tuning has the search among its ancestors already, and a teacher may belong to both.
            search = [self._search] if self._search and arm_of(name).network == "pruned" else []
            entry["train_flops_with_search"] = total_flops([outcome, *search])
        # Those that trained at once end in an order of their own.
        ended = {**self.content["arms"], name: entry}
        self.content["arms"] = {arm: ended[arm] for arm in self.study.config.arms if arm in ended}
        self._write()

    def add_transfer(self, title: str, outcome: Done | Failed) -> None:
        """Add what a network was worth as the start of a detector."""
        self.content.setdefault("transfer", {})[entry_of(title)] = self._entry(title, outcome)
        self._write()

    def finish(self) -> None:
        """Print the table; raise if a stage failed."""
        arms = self.content["arms"]
        bases = {name: self.content[name] for name in ("large", "sparse", "early") if name in self.content}
        entries = {**bases, **arms}
        finals = {f"top1/{name}": entry["top1"] for name, entry in entries.items() if entry["status"] == "done"}
        detectors = {f"detect_{name}": entry for name, entry in self.content.get("transfer", {}).items()}
        finals |= {f"map/{name}": entry["map"] for name, entry in detectors.items() if entry["status"] == "done"}
        entries |= detectors
        config = self.study.config.model_dump(mode="json", exclude={"arms", "store", "dry_run"}, serialize_as_any=True)
        write_study(self.run_dir / "tensorboard" / "hparams", config, finals, self._table())
        print(self._table())
        failed = {name: entry["reason"] for name, entry in entries.items() if entry["status"] == "failed"}
        if failed:
            raise UserError("; ".join(f"{name} failed: {reason}" for name, reason in failed.items()))

    def _entry(self, title: str, outcome: Done | Failed) -> dict[str, Any]:
        self.content.get("unfinished", {}).pop(title, None)
        if not self.content.get("unfinished"):
            self.content.pop("unfinished", None)
        if isinstance(outcome, Failed):
            return {"status": "failed", "reason": outcome.reason, "epoch": outcome.epoch}
        self._stages[title] = outcome.stage.name
        return {
            "status": "done",
            **outcome.result,
            "train_flops_total": outcome.flops_total,
            "stage": str(outcome.stage.folder),
        }

    def _table(self) -> str:
        described = self.content["study"]
        options = self.study.config.pruner
        chosen = dict(described["target"])
        if self._strength is not None:
            chosen["strength"] = self._strength
        for name, field in type(options).model_fields.items():
            value = getattr(options, name)
            if name not in ("name", "sparse", *TARGET_OPTIONS) and value != field.default:
                chosen[name] = value if not isinstance(value, tuple) else list(value)
        target = ", ".join(f"{name}={value}" for name, value in chosen.items())
        title = (
            f"{described['model']} on {described['dataset']}, {described['pruner']} {target}, "
            f"recipe {described['recipe']}, budget {described['budget']}, {described['precision']}, "
            f"seed {described['seed']}"
        )
        failures = [
            f"{name} failed: {entry['reason']}"
            for name, entry in self.content.get("arms", {}).items()
            if entry["status"] == "failed"
        ]
        notes = [f"Note: {warning}." for warning in described["warnings"]]
        at_once = max((entry.get("together", 1) for entry in self.content.get("arms", {}).values()), default=1)
        if at_once > 1:
            notes.append(f"Note: up to {at_once} trainings shared the device; seconds are those of all.")
        rounds = [rounds_table(self.content["rounds"])] if "rounds" in self.content else []
        detection = self.content.get("transfer", {})
        tables = [study_table(self.content), *([transfer_table(detection)] if detection else [])]
        failures += [f"detector of {n} failed: {e['reason']}" for n, e in detection.items() if e["status"] == "failed"]
        return "\n\n".join([title, *rounds, *tables, *failures, *notes])

    @property
    def _strength(self) -> float | None:
        """Of the penalty with which the pruner trains, if it has one."""
        strength: float | None = self.content["study"]["settings"]["pruner"].get("sparse", {}).get("strength")
        return strength

    def _write(self) -> None:
        write_json(self.run_dir / "summary.json", self.content)
        write_atomically(self.run_dir / "summary.md", f"{self._table()}\n".encode())
        record = {"run_dir": str(self.run_dir.absolute()), "stages": self._stages, "summary": self.content}
        self.study.store.record_run(self.run_id, record)


def collapse_warning(
    large: Mapping[str, Any], sparse: Mapping[str, Any], *, strength: float | None = None
) -> list[str]:
    """Return a line if the pruner's own training ended at less than half the accuracy of the plain one.

    Examples
    --------
    >>> collapse_warning({"top1": 99.0}, {"top1": 98.0})
    []
    >>> (warning,) = collapse_warning({"top1": 99.0}, {"top1": 26.0})
    >>> warning.partition(":")[2].partition(":")[0]
    " the pruner's own training ended at 26.00 %, the plain one at 99.00 %"
    """
    plain, own = large.get("top1"), sparse.get("top1")
    if plain is None or own is None or own >= plain / 2:
        return []
    ended = f"the pruner's own training ended at {own:.2f} %, the plain one at {plain:.2f} %"
    advice = "train longer" + (f", or lower pruner.sparse.strength={strength:g}" if strength else "")
    return [f"sparse: {ended}: what is pruned is a network that did not learn; {advice}"]


def describe_study(study: PreparedStudy, experiment: str | None) -> dict[str, Any]:
    """Return the part ``study`` of a summary; `experiment` is the name of the experiment file, if there is one."""
    config, info = study.config, study.inputs.info
    return {
        "experiment": experiment,
        "dataset": config.dataset.name,
        "train_images": info.train_images,
        "test_images": info.test_images,
        "model": config.model.name,
        "pruner": config.pruner.name,
        "target": {config.pruner.target_option: getattr(config.pruner, config.pruner.target_option)},
        "recipe": config.recipe.name,
        "budget": config.budget.name,
        "seed": config.seed,
        "device": describe_device(study.runtime.device),
        "precision": study.runtime.precision,
        "arms": list(config.arms),
        **({"tracker": list(config.tracker)} if config.tracker else {}),
        "settings": {
            **settings(config, study.parts),
            **({"transfer": study.transfer.settings()} if study.transfer else {}),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "commit": _commit(),
        "warnings": _warnings(study),
    }


def _warnings(study: PreparedStudy) -> list[str]:
    warnings = []
    if study.init is None and draws_anew(study.config.arms):
        warnings.append(
            f"{study.config.model.name} belongs to no known family: scratch arms draw weights with "
            "reset_parameters; name an initialiser with model.init if that is not how it is trained"
        )
    rewound = [name for name in study.config.arms if arm_of(name).weights == "early"]
    if study.config.pruner.rounds is not None and study.config.pruner.between_rounds == "epoch":
        rewound.append("pruner.between_rounds=epoch")
    if rewound and not study.budget.early_epochs:
        warnings.append(
            f"rewind.epoch={study.config.rewind.epoch:g} is less than one of {study.config.recipe.epochs} epochs: "
            f"{rewound[0]} goes back to the start, as lottery does"
        )
    return warnings


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None for an installed copy."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
