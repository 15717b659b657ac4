"""Print each pruner's accuracies less those of `l1`, seed by seed: compare.py RESULTS, the results.json of a report."""

import sys
from pathlib import Path

from rethink_prune.report.gather import gather
from rethink_prune.report.statistics import holm, paired_difference
from rethink_prune.text import markdown

ARMS = ("finetune", "scratch_e", "scratch_b")
COLUMNS = ("network", "pruner", "arm", "n", "minus `l1`", "95 % interval", "p", "p (Holm)")


def table(results: Path) -> str:
    """Return the differences as Markdown; p values are corrected for all of its lines."""
    # By network, pruner and arm: top-1 of each seed.
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for run in gather([results]).runs:
        for arm in ARMS:
            if arm in run.arms:
                place = (run.study.model, run.study.pruner, arm)
                found.setdefault(place, {})[run.study.seed] = run.arms[arm].top1
    cells, ps = [], []
    for (network, pruner, arm), values in found.items():
        ours = found.get((network, "l1", arm), {})
        seeds = sorted(values.keys() & ours.keys())
        # Pruners that leave the same widths share their scratch arms, and one seed has no interval.
        if pruner == "l1" or len(seeds) < 2 or (arm != "finetune" and values == ours):
            continue
        difference = paired_difference([values[s] for s in seeds], [ours[s] for s in seeds], margin=0.5)
        interval = "[{:+.2f}, {:+.2f}]".format(*difference.interval) if difference.interval else ""
        ps.append(difference.p)
        cells.append(
            [network, pruner, arm, str(len(seeds)), f"{difference.mean:+.2f}", interval, f"{difference.p:.2g}"]
        )
    return markdown(COLUMNS, [[*row, f"{p:.2g}"] for row, p in zip(cells, holm(ps), strict=True)])


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
