"""``summary.json`` and ``summary.md`` of a study, and the table in the terminal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically, write_json
from rethink_prune.store.stage import Done, Failed
from rethink_prune.store.store import Store
from rethink_prune.study.tables import study_table
from rethink_prune.study.work import PrunedNetwork
from rethink_prune.tracking.tensorboard import write_study


class Summary:
    """The summary of a run, rewritten after every stage.

    Parameters
    ----------
    run_dir : Path
        Where it is written.
    store : Store
        Gets a record of which run uses which stages, and a copy of the summary.
    described : mapping
        What is known about the study as a whole; ``warnings`` among it.
    hparams : mapping
        The configuration, for TensorBoard.
    """

    def __init__(self, run_dir: Path, store: Store, described: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        self.store = store
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        self.content: dict[str, Any] = {"study": dict(described)}
        self._hparams = hparams
        self._stages: dict[str, str] = {}
        self._write()

    def add_base(self, name: str, outcome: Done | Failed) -> None:
        """Add the unpruned network as trained plainly (``large``) or by the pruner (``sparse``)."""
        self.content[name] = self._entry(name, outcome)
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
            shown = ("top1", "top5", "loss", "peak_memory_bytes")
            entry.update({name: done.result[name] for name in shown if name in done.result})
            entry["stage"] = str(done.stage.folder)
            self._stages["prune"] = done.stage.name
        entry.update(layers=list(pruned.report["layers"]), frozen=dict(pruned.report["frozen"]))
        self.content["pruned"] = entry
        self.content["study"]["warnings"] += list(pruned.report["warnings"])
        self.content["study"]["ledger"] = dict(ledger)
        self.content["arms"] = {}
        self._write()

    def add_arm(self, name: str, outcome: Done | Failed) -> None:
        """Add one arm."""
        self.content["arms"][name] = self._entry(name, outcome)
        self._write()

    def finish(self) -> None:
        """Print the table; raise if a stage failed."""
        arms = self.content["arms"]
        bases = {name: self.content[name] for name in ("large", "sparse") if name in self.content}
        entries = {**bases, **arms}
        finals = {f"top1/{name}": entry["top1"] for name, entry in entries.items() if entry["status"] == "done"}
        write_study(self.run_dir / "tensorboard" / "hparams", self._hparams, finals, self._table())
        print(self._table())
        failed = {name: entry["reason"] for name, entry in entries.items() if entry["status"] == "failed"}
        if failed:
            raise UserError("; ".join(f"{name} failed: {reason}" for name, reason in failed.items()))

    def _entry(self, title: str, outcome: Done | Failed) -> dict[str, Any]:
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
        target = ", ".join(f"{name}={value}" for name, value in described["target"].items())
        title = (
            f"{described['model']} on {described['dataset']}, {described['pruner']} {target}, "
            f"recipe {described['recipe']}, budget {described['budget']}, seed {described['seed']}"
        )
        failures = [
            f"{name} failed: {entry['reason']}"
            for name, entry in self.content.get("arms", {}).items()
            if entry["status"] == "failed"
        ]
        notes = [f"Note: {warning}." for warning in described["warnings"]]
        return "\n\n".join([title, study_table(self.content), *failures, *notes])

    def _write(self) -> None:
        write_json(self.run_dir / "summary.json", self.content)
        write_atomically(self.run_dir / "summary.md", f"{self._table()}\n".encode())
        record = {"run_dir": str(self.run_dir.absolute()), "stages": self._stages, "summary": self.content}
        self.store.record_run(self.run_id, record)
