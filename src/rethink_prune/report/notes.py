"""What a reader has to know of a row: missing seeds, shared networks, and the paper's accuracies (``paper.yaml``)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rethink_prune.report.comparisons import planned_networks
from rethink_prune.report.networks import network_label
from rethink_prune.report.records import RunRecord
from rethink_prune.report.statistics import SeedStatistics
from rethink_prune.study.arms import known_arm

ONE_PRETRAINED = "All seeds share one pretrained network: what training another would change is left out."
# By experiment.
_TABLES: Mapping[str | None, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables.

    Attributes
    ----------
    epochs
        Of the unpruned network and of Scratch-E.
    note
        How the accuracies differ from what is compared with them.
    top1
        By arm; of the best epoch on the test images.
    """

    table: int
    epochs: int
    note: str | None
    top1: Mapping[str, SeedStatistics]


def paper_row(experiment: str | None, target: Mapping[str, Any]) -> PaperRow | None:
    """Return what the paper has for an experiment at a target; None if it has nothing.

    Examples
    --------
    >>> row = paper_row("l1_vgg16_cifar10", {"variant": "A"})
    >>> row.table, row.epochs, row.top1["scratch_b"]
    (1, 160, SeedStatistics(n=5, mean=93.78, sd=0.15))
    """
    table = _TABLES.get(experiment, {"rows": []})
    for row in table["rows"]:
        if row["target"] == target:
            top1 = {arm: SeedStatistics(table["runs"], *value) for arm, value in row.items() if arm != "target"}
            return PaperRow(table["table"], table["epochs"], table.get("note"), top1)
    return None


def row_notes(runs: Sequence[RunRecord], paper: PaperRow | None) -> Iterator[str]:
    """Yield the notes of a row, from its runs and from what the paper has for it."""
    images = {run.study.test_images for run in runs} - {None}
    if len(images) == 1 and (count := images.pop()):
        yield f"{count:,} test images: one is {100 / count:.2f} points; intervals cover seeds, not the choice of images"
    yield from _missing_networks(runs)
    for stage, seeds in pretrained_networks(runs).items():
        if len(seeds) > 1:
            yield f"seeds {_listed(seeds)} share one pretrained network, {stage}"
    yield from _different_processes(runs)
    if paper is not None:
        yield from _unlike_paper(runs, paper)


def pretrained_networks(runs: Iterable[RunRecord]) -> dict[str, set[int]]:
    """Return the networks that were pruned, by stage, with the seeds that start from each."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        # Where a pruner trains a network of its own, that is the one it prunes.
        base = run.sparse or run.large
        # Where it is not recorded, each seed is taken to have its own.
        seeds[base.stage if base is not None and base.stage else f"{run.study.seed}"].add(run.study.seed)
    return seeds


def _missing_networks(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield, in words, what seeds lack that others have or that was asked for."""
    for network in planned_networks(runs):
        for run in runs:
            entry = run.trained.get(network)
            if entry is not None and entry.finished:
                continue
            if entry is not None and entry.status == "failed":
                why = f"failed: {entry.reason or 'no reason was recorded'}"
            elif entry is not None:
                why = "has no accuracy (not a number)"
            elif network in run.study.arms:
                why = "is not finished"
            else:
                why = "was not asked for" if run.study.arms and known_arm(network) else "is not there"
            yield f"seed {run.study.seed}: {network_label(network).name} {why}"


def _different_processes(runs: Iterable[RunRecord]) -> Iterator[str]:
    """Yield a note if arms were trained by different numbers of processes."""
    numbers: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for run in runs:
        for network, entry in run.trained.items():
            if entry.processes:
                numbers[entry.processes].add(network)
    if len(numbers) > 1:
        parts = [f"{' and '.join(map(str, n))} in {_listed(names)}" for n, names in sorted(numbers.items())]
        yield f"arms were trained by different numbers of processes: {'; '.join(parts)}"


def _unlike_paper(runs: Sequence[RunRecord], paper: PaperRow) -> Iterator[str]:
    """Yield notes on what keeps accuracies from being comparable with the paper's."""
    # The arms whose length is the recipe's; the others' lengths follow from it.
    entries = [run.trained.get(network) for run in runs for network in ("large", "scratch_e")]
    lengths = {entry.epochs for entry in entries if entry is not None and entry.finished} - {None, paper.epochs}
    if lengths:
        yield f"not comparable with the paper: trained for {_listed(lengths)} epochs instead of {paper.epochs}"
    precisions = {run.study.precision for run in runs} - {"", "fp32"}
    if precisions:
        yield f"trained in {_listed(precisions)}; the paper's are trained in fp32"
    datasets = [(run.study.settings or {}).get("dataset", {}) for run in runs]
    limits = [name for name in ("train_limit", "test_limit") if any(data.get(name) is not None for data in datasets)]
    if limits:
        yield f"not comparable with the paper: only part of the images is used ({_listed(limits)})"
    if paper.note:
        yield f"the paper's accuracies: {paper.note}"


def _listed(values: Iterable[object]) -> str:
    # Sets have no order of their own, and the same runs must give the same text.
    return ", ".join(map(str, sorted(values, key=str)))
