"""``python -m rethink_prune.report RUN_OR_STORE...``: which arm wins over many runs, and how sure that is."""

import argparse
import math
import sys
from pathlib import Path

from rethink_prune.errors import UserError

# Of a report with many runs: a picture takes a third of a second.
MOST_PICTURES = 40
MANY_RUNS = (
    "these are {runs:,} runs, more than {most:,}: curves, masks and pictures of single rows are left out, and of "
    "tables and sweeps the first {pictures} pictures are drawn; name fewer runs, or add --details"
)


def main(arguments: list[str] | None = None) -> int:
    """Write a report over the given runs; returns the exit status."""
    description = "Compare the arms of many runs over their seeds: tables, statistics, pictures, and a page."
    parser = argparse.ArgumentParser(prog="rethink-prune-report", description=description)
    places = "run folders, folders that hold some, stores, or results.json of earlier reports"
    margin = "within which arms are equivalent (%(default)s)"
    by = "give each value of a setting, such as recipe.lr, rows of its own; can be repeated"
    mix = "put runs into one row though their settings differ"
    details = "read curves and masks, and draw every picture, however many runs there are"
    parser.add_argument("places", nargs="+", type=Path, metavar="RUN_OR_STORE", help=places)
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--margin", type=float, default=0.5, metavar="POINTS", help=margin)
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help=by)
    parser.add_argument("--mix", action="store_true", help=mix)
    push = "write no report, but send finished trainings to a tracker; what it has already is not sent again"
    tracker = "which one (with --push; those that the runs were given, else the one that is installed); can be repeated"
    parser.add_argument("--push", action="store_true", help=push)
    parser.add_argument("--tracker", action="append", default=[], metavar="NAME", help=tracker)
    parser.add_argument("--details", action="store_true", help=details)
    options = parser.parse_args(arguments)
    if not (math.isfinite(options.margin) and options.margin > 0):
        parser.error("--margin: must be a number of points above 0")
    if options.tracker and not options.push:
        parser.error("--tracker: goes with --push")
    # Imported here: --help needs no SciPy.
    from rethink_prune.report import documents, gather, groups, results

    try:
        if options.push:
            from rethink_prune.report.push import push_runs

            print("\n".join(push_runs(gather.gather(options.places), options.tracker)))
            return 0
        most = None if options.details else gather.DETAILED_RUNS
        gathered = gather.gather(options.places, masks=True, most_detailed=most)
        detailed = most is None or len(gathered.runs) <= most
        if not detailed:
            gathered.problems.append(MANY_RUNS.format(runs=len(gathered.runs), most=most, pictures=MOST_PICTURES))
        found = groups.group_runs(gathered.runs, by=options.by, mix=options.mix)
        report = results.compute_report(found, margin=options.margin, problems=gathered.problems)
        pictures = None if detailed else MOST_PICTURES
        overview = documents.publish(report, found, options.out, detections=gathered.detections, most_pictures=pictures)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(overview)
    print(f"\nThe page: {options.out / documents.PAGE_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
