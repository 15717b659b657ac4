"""The table of a study, as Markdown and for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rethink_prune.text import markdown

COLUMNS = (
    "arm",
    "top-1 %",
    "top-5 %",
    "vs large",
    "parameters",
    "MACs",
    "epochs",
    "training FLOPs",
    "total FLOPs",
    "with search",
    "seconds",
)
ROUND_COLUMNS = ("round", "channels", "weights", "MACs", "top-1 % before", "pruned", "trained", "epochs")
TRANSFER_COLUMNS = ("detector", "mAP %", "best", *COLUMNS[4:9], COLUMNS[10])
PLAN_COLUMNS = ("arm", "epochs", "milestones", "training FLOPs", "total FLOPs")


def study_table(summary: Mapping[str, Any]) -> str:
    """Return a study's table as Markdown: large, the pruned network before training, and every arm.

    Arms that are one training share a row.

    ``training FLOPs`` is the row's own training, ``total FLOPs`` adds what it built on, ``with search`` the trainings
    by which the pruned network's widths had to be found. Columns in which no row says anything of its own are left out.
    """
    rows = study_rows(summary)
    total, search = COLUMNS.index("total FLOPs"), COLUMNS.index("with search")
    if all(row[search] in ("", row[total]) for row in rows):
        rows = [[*row[:search], "", *row[search + 1 :]] for row in rows]
    optional = {COLUMNS.index(name) for name in ("top-5 %", "with search")}
    shown = [index for index in range(len(COLUMNS)) if index not in optional or any(row[index] for row in rows)]
    return markdown([COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in rows])


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return the rounds of a study as Markdown: what each left, and the accuracy before, after, and after training.

    Examples
    --------
    >>> entry = {"round": 1, "channels": None, "weights": 500, "macs": 2e6, "top1_before": 99.0, "top1": 60.0}
    >>> print(rounds_table([{**entry, "top1_trained": 98.0, "epochs": 12}]))
    | round | weights |   MACs | top-1 % before | pruned | trained | epochs |
    | ----- | ------: | -----: | -------------: | -----: | ------: | -----: |
    | 1     |     500 | 2.00 M |          99.00 |  60.00 |   98.00 |     12 |
    """
    rows = [
        [
            str(entry["round"]),
            _number(entry["channels"]),
            _number(entry["weights"]),
            _millions(entry["macs"]),
            *("" if entry[name] is None else f"{entry[name]:.2f}" for name in ("top1_before", "top1", "top1_trained")),
            _number(entry["epochs"] or None),
        ]
        for entry in rounds
    ]
    shown = [index for index in range(len(ROUND_COLUMNS)) if index != 1 or any(row[1] for row in rows)]
    return markdown([ROUND_COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in rows])


def transfer_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the detectors of a study as Markdown.

    Examples
    --------
    >>> entry = {"map": 71.5, "map_best": 72.0, "params": 500, "macs": 2e6, "epochs": 7, "train_flops": 1e15}
    >>> print(transfer_table({"unpruned": {**entry, "train_flops_total": 3e15, "seconds": 60.0}}))
    | detector | mAP % |  best | parameters |   MACs | epochs | training FLOPs | total FLOPs | seconds |
    | -------- | ----: | ----: | ---------: | -----: | -----: | -------------: | ----------: | ------: |
    | unpruned | 71.50 | 72.00 |        500 | 2.00 M |      7 |          1e+15 |       3e+15 |    60.0 |
    """
    rows = []
    for name, entry in entries.items():
        if entry.get("status") == "failed":
            rows.append([name, "failed", *[""] * (len(TRANSFER_COLUMNS) - 2)])
            continue
        costs = (_number(entry["params"]), _millions(entry["macs"]), _number(entry["epochs"]))
        flops = (_flops(entry["train_flops"]), _flops(entry["train_flops_total"]))
        rows.append(
            [name, f"{entry['map']:.2f}", f"{entry['map_best']:.2f}", *costs, *flops, f"{entry['seconds']:.1f}"]
        )
    return markdown(TRANSFER_COLUMNS, rows)


def study_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of that table, one for each of the `COLUMNS`."""
    large = summary.get("large") or {}
    rows = [_row("large", large, None)] if large else []
    if "sparse" in summary:
        rows.append(_row("sparse", summary["sparse"], large.get("top1")))
    pruned = summary.get("pruned") or {}
    if "top1" in pruned:
        rows.append(_row("pruned, not retrained", pruned, large.get("top1")))
        if pruned.get("top1_recalibrated") is not None:
            own = {"top1": pruned["top1_recalibrated"], "params": pruned["params"], "macs": pruned["macs"]}
            rows.append(_row("pruned, statistics re-estimated", own, large.get("top1")))
    arms = summary.get("arms", {})
    rows += [_row(", ".join(names), arms[names[0]], large.get("top1")) for names in same_trainings(arms)]
    return rows


def same_trainings(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the arms of a summary or a plan, those that are one training together; the first one stands for it.

    Parameters
    ----------
    arms : mapping of str to mapping
        ``arms`` of ``summary.json``, where such arms have one ``stage``, or of ``plan.json``, where they say
        ``same_as``.

    Examples
    --------
    >>> same_trainings({"scratch_e": {"stage": "a"}, "finetune": {"stage": "b"}, "scratch@e": {"stage": "a"}})
    [['scratch_e', 'scratch@e'], ['finetune']]
    """
    trainings: dict[str, list[str]] = {}
    for name, entry in arms.items():
        # An arm that failed has no stage.
        trainings.setdefault(entry.get("same_as") or entry.get("stage") or name, []).append(name)
    return list(trainings.values())


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return a plan for the terminal: the networks, and what every arm will train.

    ``total FLOPs`` adds what an arm builds on.

    Examples
    --------
    >>> length = {"epochs": 2, "milestones": [1], "train_flops": 24e6}
    >>> large = {"params": 1000, "macs": 2_000_000, **length, "trained": True}
    >>> arms = {"scratch_b": {"epochs": None, "milestones": None, "train_flops": None}}
    >>> print(plan_text({"large": large, "pruned": {"known": False}, "arms": arms}))
    large: 1,000 parameters, 2.00 M MACs
    <BLANKLINE>
    | arm       | epochs |    milestones | training FLOPs | total FLOPs |
    | --------- | -----: | ------------: | -------------: | ----------: |
    | large     |      2 |             1 |        2.4e+07 |     2.4e+07 |
    | scratch_b |        | after pruning |                |             |
    """
    large, pruned = plan["large"], plan["pruned"]
    networks = [f"large: {large['params']:,} parameters, {_millions(large['macs'])} MACs"]
    if pruned["known"]:
        networks.append(f"pruned: {pruned['params']:,} parameters, {_millions(pruned['macs'])} MACs")
    return "\n\n".join(["; ".join(networks), markdown(PLAN_COLUMNS, _plan_rows(plan))])


def _plan_rows(plan: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name in ("large", "sparse"):
        if name in plan:
            base = plan[name]
            milestones = " ".join(map(str, base["milestones"]))
            title = name if base["trained"] else f"{name} (not trained)"
            flops = _flops(base["train_flops"])
            rows.append([title, str(base["epochs"]), milestones, flops, flops])
    for name, between in plan.get("before_arms", {}).items():
        rows.append([name, _number(between["epochs"]), "", _flops(between["train_flops"]), ""])
    for names in same_trainings(plan["arms"]):
        arm = plan["arms"][names[0]]
        milestones = " ".join(map(str, arm["milestones"])) if arm["milestones"] is not None else "after pruning"
        own, total = arm["train_flops"], arm.get("train_flops_total")
        rows.append([", ".join(names), _number(arm["epochs"]), milestones, _flops(own), _flops(total)])
    for name, spec in plan.get("transfer", {}).items():
        milestones = " ".join(map(str, spec["milestones"]))
        rows.append(
            [name, str(spec["epochs"]), milestones, *map(_flops, (spec["train_flops"], spec["train_flops_total"]))]
        )
    return rows


def _row(name: str, entry: Mapping[str, Any], large_top1: float | None) -> list[str]:
    if entry.get("status") == "failed":
        return [name, "failed", *[""] * (len(COLUMNS) - 2)]
    top1 = entry.get("top1")
    change = top1 - large_top1 if top1 is not None and large_top1 is not None else None
    return [
        name,
        "" if top1 is None else f"{top1:.2f}",
        "" if entry.get("top5") is None else f"{entry['top5']:.2f}",
        "" if change is None else f"{change:+.2f}",
        f"{entry['params']:,}",
        _millions(entry["macs"]),
        _number(entry.get("epochs")),
        _flops(entry.get("train_flops")),
        _flops(entry.get("train_flops_total")),
        _flops(entry.get("train_flops_with_search")),
        "" if entry.get("seconds") is None else f"{entry['seconds']:.1f}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _flops(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _millions(value: float) -> str:
    return f"{value / 1e6:,.2f} M"
