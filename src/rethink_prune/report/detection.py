"""Detection: what a study's networks are worth to a second task, over seeds.

A detector starts from a network of the study. It is compared by its mean average precision (mAP) after the last epoch,
seed by seed, as arms are by their accuracy. These comparisons are a family of their own for Holm's correction.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rethink_prune.report.comparisons import ArmComparison, compare_pair, correct_for_table, verdict
from rethink_prune.report.ledger import amortised_detector, shared_by_detectors
from rethink_prune.report.networks import in_detector_order, network_label, trains_pruned
from rethink_prune.report.notes import ONE_PRETRAINED
from rethink_prune.report.records import DetectorRecord, RunRecord, printable, value_text
from rethink_prune.report.remaining import mean_if_known
from rethink_prune.report.seed_curve import SeedCurve, curve_over_seeds
from rethink_prune.report.statistics import SeedStatistics, describe_seeds

UNPRUNED = "unpruned"
_PRUNED_FIRST = ("prune_c", "prune_d")
_FROM_SCRATCH = ("scratch_e", "scratch_b")
FROZEN_NORMS = (
    "Batch norms are frozen in every detector: each network keeps the statistics of its own training on "
    "classification, those from scratch too."
)


@dataclass(frozen=True)
class TransferRow:
    """What a row of classification brings to a detection table."""

    slug: str
    pruned_by: str
    runs: Sequence[RunRecord]
    one_pretrained: bool


@dataclass(frozen=True)
class DetectorOverSeeds:
    """The detectors that start from one kind of network.

    Attributes
    ----------
    entry
        What they start from.
    map, map_best
        Mean average precision in percent: after the last epoch, and of the best epoch on the test pictures.
    ap
        Average precision in percent, by class.
    coco
        COCO's average precision in percent: ``map``, ``map_50``, ``map_75``; nothing where it was not computed.
    epochs, params, macs, train_flops, flops_total, flops_amortised
        Means over seeds; `flops_total` is with all trainings that it builds on, `flops_amortised` with those that
        several rows share divided among them.
    curve
        mAP during training, where every seed's is known.
    stages
        The seeds, each with the name of its stage.
    """

    entry: str
    map: SeedStatistics | None
    map_best: SeedStatistics | None
    ap: Mapping[str, SeedStatistics]
    coco: Mapping[str, SeedStatistics]
    epochs: float | None
    params: float | None
    macs: float | None
    train_flops: float | None
    flops_total: float | None
    flops_amortised: float | None
    curve: SeedCurve | None
    stages: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class DetectionRow:
    """One study over its seeds.

    Attributes
    ----------
    slug
        Its name in file names.
    seeds
        Those that have a detector.
    best
        The pruned networks with the highest mean, if there are two or more to choose from.
    """

    slug: str
    network: str
    pruned_by: str
    seeds: tuple[int, ...]
    detectors: tuple[DetectorOverSeeds, ...]
    best: tuple[str, ...]
    comparisons: tuple[ArmComparison, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name of the row in a sentence."""
        return f"{self.network}, {self.pruned_by}"

    @property
    def verdicts(self) -> list[str]:
        """What all its comparisons show."""
        return [comparison.verdict for comparison in self.comparisons]

    def detector(self, entry: str) -> DetectorOverSeeds | None:
        """Return the detectors that start from a kind of network, if the row has them."""
        return next((found for found in self.detectors if found.entry == entry), None)


@dataclass(frozen=True)
class DetectionTable:
    """The rows of one classification table that were transferred to the same pictures."""

    title: str
    entries: tuple[str, ...]
    rows: tuple[DetectionRow, ...]


@dataclass(frozen=True)
class _Transferred:
    """The runs of a row that were transferred to the same pictures; `shared`: how many rows have each stage."""

    row: TransferRow
    shared: Mapping[str, int]
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def entries(self) -> list[str]:
        return in_detector_order({entry for run in self.runs for entry in run.transfer})


def detection_tables(rows: Sequence[TransferRow], *, margin: float, conditions: str) -> tuple[DetectionTable, ...]:
    """Return the detection tables of a classification table; none without a transfer.

    Parameters
    ----------
    rows
        Of one data set, recipe and budget.
    margin
        Points of mAP within which detectors count as equivalent.
    conditions
        What all rows have in common.
    """
    tables: dict[tuple[str, str], dict[str, _Transferred]] = defaultdict(dict)
    shared = shared_by_detectors([row.runs for row in rows])
    for row in rows:
        for run in row.runs:
            if run.transfer:
                settings = run.study.transfer
                # Two folders in one layout have one name.
                pictures = (transfer_name(run), value_text(settings.get("fingerprint")))
                tables[pictures].setdefault(row.slug, _Transferred(row, shared)).runs.append(run)
    return tuple(
        _detection_table(name, list(members.values()), number, margin, conditions)
        for number, ((name, _), members) in enumerate(tables.items(), 1)
    )


def transfer_name(run: RunRecord) -> str:
    """Return the name of the pictures that a run's networks were transferred to."""
    return printable(str(run.study.transfer.get("name") or "pictures"))


def _detection_table(
    name: str, members: Sequence[_Transferred], number: int, margin: float, conditions: str
) -> DetectionTable:
    compared = [list(_compare_detectors(member, margin)) for member in members]
    corrected = correct_for_table(compared)
    family = sum(comparison.tested is not None for row in corrected for comparison in row)
    trained = f"mAP on {name}, {conditions}"
    rows = []
    for member, comparisons in zip(members, corrected, strict=True):
        also = f" {ONE_PRETRAINED}" if member.row.one_pretrained else ""
        said = [
            replace(each, verdict=verdict(each, margin=margin, family=family, conditions=trained) + also)
            for each in comparisons
        ]
        rows.append(_detection_row(member, said, number))
    entries = in_detector_order({entry for member in members for entry in member.entries})
    return DetectionTable(f"{name}{_what_is_detected(members[0].runs[0])}, {conditions}", tuple(entries), tuple(rows))


def _what_is_detected(run: RunRecord) -> str:
    """Return how much there is to detect, and in how many pictures, as far as it was recorded."""
    classes, pictures = run.study.transfer.get("classes"), run.study.transfer.get("test_pictures")
    parts = [f"{len(classes)} classes"] if isinstance(classes, list) else []
    parts += [f"{pictures:,} test pictures"] if isinstance(pictures, int) else []
    return f" ({', '.join(parts)})" if parts else ""


def _compare_detectors(member: _Transferred, margin: float) -> Iterator[ArmComparison]:
    for first, second in _planned_pairs(member.entries):
        both = [(run.study.seed, _finished(run, first), _finished(run, second)) for run in member.runs]
        found = [(seed, a.map, b.map) for seed, a, b in both if a and b and a.map is not None and b.map is not None]
        seeds, ours, theirs = zip(*found, strict=True) if found else ((), (), ())
        yield compare_pair(first, second, seeds, ours, theirs, margin=margin)


def _planned_pairs(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Return what is compared: from scratch with pruned, other arms with Prune-C.

    Examples
    --------
    >>> _planned_pairs(["unpruned", "prune_c", "scratch_e", "lottery"])
    [('scratch_e', 'prune_c'), ('lottery', 'prune_c')]
    """
    others = [entry for entry in entries if entry not in (UNPRUNED, *_PRUNED_FIRST, *_FROM_SCRATCH)]
    # Not with the unpruned network, too: each further comparison takes more seeds to show any.
    pairs = [(first, second) for first in _FROM_SCRATCH for second in _PRUNED_FIRST]
    pairs += [(first, _PRUNED_FIRST[0]) for first in others]
    return [pair for pair in pairs if {*pair} <= {*entries}]


def _finished(run: RunRecord, entry: str) -> DetectorRecord | None:
    found = run.transfer.get(entry)
    return found if found is not None and found.finished else None


def _detection_row(member: _Transferred, comparisons: Sequence[ArmComparison], number: int) -> DetectionRow:
    detectors = tuple(_detector_over_seeds(entry, member.runs, member.shared) for entry in member.entries)
    # As the table shows them: what looks equal there is all the best.
    means = {each.entry: round(each.map.mean, 2) for each in detectors if each.map and _is_pruned(each.entry)}
    return DetectionRow(
        slug=f"{member.row.slug}-{number}",
        network=member.runs[0].study.model,
        pruned_by=member.row.pruned_by,
        seeds=tuple(run.study.seed for run in member.runs),
        detectors=detectors,
        best=tuple(entry for entry, mean in means.items() if len(means) > 1 and mean == max(means.values())),
        comparisons=tuple(comparisons),
        notes=tuple(_missing_detectors(member)),
    )


def _is_pruned(entry: str) -> bool:
    return entry != UNPRUNED and trains_pruned(entry)


def _detector_over_seeds(entry: str, runs: Sequence[RunRecord], shared: Mapping[str, int]) -> DetectorOverSeeds:
    found = [(run.study.seed, detector) for run in runs if (detector := _finished(run, entry))]
    done = [detector for _, detector in found]

    def over_seeds(values: Sequence[float | None]) -> SeedStatistics | None:
        # A mean over some of the seeds would not belong to the other numbers.
        known = [value for value in values if value is not None]
        return describe_seeds(known) if len(known) == len(values) else None

    def by_name(parts: Sequence[Mapping[str, float | None]]) -> dict[str, SeedStatistics]:
        names = dict.fromkeys(name for part in parts for name in part)
        seeds = {name: over_seeds([part.get(name) for part in parts]) for name in names}
        return {name: value for name, value in seeds.items() if value is not None}

    def mean(cost: str) -> float | None:
        return mean_if_known([getattr(each, cost) for each in done])

    amortised = [amortised_detector(run, entry, shared) for run in runs if _finished(run, entry)]

    return DetectorOverSeeds(
        entry=entry,
        map=over_seeds([each.map for each in done]),
        map_best=over_seeds([each.map_best for each in done]),
        ap=by_name([each.ap for each in done]),
        coco=by_name([each.coco or {} for each in done]),
        epochs=mean("epochs"),
        params=mean("params"),
        macs=mean("macs"),
        train_flops=mean("train_flops"),
        flops_total=mean("train_flops_total"),
        flops_amortised=mean_if_known(amortised),
        curve=curve_over_seeds(done),
        stages=tuple((seed, each.stage) for seed, each in found if each.stage),
    )


def _missing_detectors(member: _Transferred) -> Iterator[str]:
    """Yield, in words, which detectors seeds lack that others have."""
    for entry in member.entries:
        for run in member.runs:
            if _finished(run, entry) is None:
                found = run.transfer.get(entry)
                failed = found is not None and found.status == "failed"
                why = f"failed: {found.reason or 'no reason was recorded'}" if found and failed else "is not finished"
                yield f"seed {run.study.seed}: the detector of {network_label(entry).name} {why}"
