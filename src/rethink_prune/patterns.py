"""``python -m rethink_prune.patterns RUN_OR_STORE...``: what pruning leaves, by layer and by layer stage."""

import argparse
import sys
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.imports import import_object


def main(arguments: list[str] | None = None) -> int:
    """Write the patterns of the given runs; returns the exit status."""
    description = "Show what pruning leaves: kept widths by layer and by layer stage, and kept positions of kernels."
    parser = argparse.ArgumentParser(prog="rethink-prune-patterns", description=description)
    places = "run folders, folders that hold some, stores, or results.json of reports"
    factory = "what builds a network of your own, or torchvision's: without it, its layer stages are not known"
    by = "give each value of a setting, such as pruner.scope, rows of its own; can be repeated"
    mix = "put runs into one row though their settings differ"
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN_OR_STORE", help=places)
    parser.add_argument("--out", type=Path, default=Path("patterns"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--factory", metavar="path.to.module:factory", help=factory)
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help=by)
    parser.add_argument("--mix", action="store_true", help=mix)
    options = parser.parse_args(arguments)
    # Imported here: --help needs no SciPy.
    from rethink_prune.report import documents, gather, groups, patterns

    try:
        build = import_object(options.factory, "--factory") if options.factory else None
        gathered = gather.gather(options.places, masks=True)
        runs = [run.without_transfer() for run in gathered.runs]
        found = groups.group_runs(runs, by=options.by, mix=options.mix)
        rows = [patterns.row_pattern(group, number, build) for number, group in enumerate(found, 1)]
        print(documents.publish_patterns(rows, options.out))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for problem in gathered.problems:
        print(problem, file=sys.stderr)
    print(f"\nTables and pictures: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
