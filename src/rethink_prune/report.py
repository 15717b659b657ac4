"""``python -m rethink_prune.report RUN_DIR...``: one table over many runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.files import write_json
from rethink_prune.results.runs import find_summaries, runs_table, without_paths


def main(arguments: list[str] | None = None) -> int:
    """Print the table of the given runs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="rethink-prune-report", description="One table over many runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, folders that hold some, or a store")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the arms' curves (.png or .svg)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the summaries, without paths of this machine"
    )
    options = parser.parse_args(arguments)
    try:
        summaries = find_summaries(options.runs)
        print(runs_table(summaries))
        if options.json:
            write_json(options.json, [without_paths(summary) for summary in summaries])
        if options.plot:
            from rethink_prune.results.plots import plot_curves

            plot_curves(summaries, options.plot)
            print(f"\nCurves: {options.plot}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
