"""Write the table of experiments/README.md from the results in its folders.

python scripts/experiments_table.py            # writes it
python scripts/experiments_table.py --check    # tells whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rethink_prune.files import write_atomically
from rethink_prune.report.gather import gather
from rethink_prune.report.groups import group_runs
from rethink_prune.report.networks import PAPER_ARMS, network_label
from rethink_prune.report.results import ResultRow, compute_report
from rethink_prune.text import markdown

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
BEGIN, END = "<!-- the table: scripts/experiments_table.py writes it -->\n", "<!-- end of the table -->\n"
TITLES = tuple(network_label(arm).title for arm in PAPER_ARMS)
COLUMNS = ("folder", "images", "network", "pruned by", "n", *TITLES, "Scratch-B minus fine-tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table is old")
    options = parser.parse_args()
    path = EXPERIMENTS / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{table()}\n\n{END}{after}"
    if options.check:
        sys.exit(None if new == text else f"{path}: the table is old; run scripts/experiments_table.py")
    write_atomically(path, new.encode())


def table() -> str:
    """Return the table over all experiments as Markdown."""
    rows = [
        cells(folder, found.dataset, row)
        for folder in sorted(path for path in EXPERIMENTS.iterdir() if path.is_dir())
        for results in sorted(folder.glob("*.json"))
        for found in compute_report(group_runs(gather([results]).runs, by=told_apart(results)), margin=0.5).tables
        for row in found.rows
        # What only trains from scratch, such as the sizes of a search, is in the table of its own page.
        if row.arm("finetune") is not None
    ]
    return markdown(COLUMNS, rows)


def told_apart(results: Path) -> list[str]:
    """Return the settings by which the report that wrote a file told its groups apart."""
    content = json.loads(results.read_text())
    # Reports of earlier versions did not say, and the first ones wrote a list of summaries.
    return content.get("by", []) if isinstance(content, dict) else []


def cells(folder: Path, dataset: str, row: ResultRow) -> list[str]:
    link = f"[{folder.name}]({folder.name}/README.md)"
    finished = row.arm("finetune")
    n = str(finished.top1.n if finished is not None and finished.top1 is not None else 0)
    return [link, dataset, row.network, row.pruned_by, n, *accuracies(row), difference(row)]


def accuracies(row: ResultRow) -> Iterator[str]:
    for name in PAPER_ARMS:
        result = row.arm(name)
        top1 = result.top1 if result else None
        if top1 is None:
            yield ""
        else:
            yield f"{top1.mean:.2f}" if top1.sd is None else f"{top1.mean:.2f} ± {top1.sd:.2f}"


def difference(row: ResultRow) -> str:
    for comparison in row.comparisons:
        found = comparison.difference
        if (comparison.first, comparison.second) == ("scratch_b", "finetune") and found is not None:
            interval = " [{:+.2f}, {:+.2f}]".format(*found.interval) if found.interval else ""
            return f"{found.mean:+.2f}{interval}"
    return ""


if __name__ == "__main__":
    main()
