"""``python -m rethink_prune.board RUN_OR_STORE...``: the arms' curves in TensorBoard, kept up to date."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rethink_prune.errors import UserError

SECONDS = 5


def main(arguments: list[str] | None = None) -> int:
    """Show runs in TensorBoard until Ctrl-C; returns the exit status."""
    description = "Show the arms of many runs in TensorBoard, means over seeds first, and follow those that train."
    parser = argparse.ArgumentParser(prog="rethink-prune-board", description=description)
    places = "run folders, folders that hold some, stores, or results.json of reports (runs)"
    out = "where its event files go; nothing else there is touched (%(default)s)"
    parser.add_argument("places", nargs="*", type=Path, default=[Path("runs")], metavar="RUN_OR_STORE", help=places)
    parser.add_argument("--out", type=Path, default=Path("board"), metavar="FOLDER", help=out)
    parser.add_argument("--port", type=int, default=6006, help="on this machine alone; 0 takes any (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        _follow(options.places, options.out, options.port)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _follow(places: Sequence[Path], folder: Path, port: int) -> None:
    # Imported here: --help needs none of it.
    from rethink_prune.report.curves import board_groups
    from rethink_prune.report.gather import gather
    from rethink_prune.tracking.board import BoardFolder, start_tensorboard

    gathered = gather(places)
    with closing(BoardFolder(folder)) as board:
        board.write(board_groups(gathered.runs))
        print(f"Open {start_tensorboard(folder, port)}\nIt follows the runs. Ctrl-C ends it.", flush=True)
        problems, told = gathered.problems, set[str]()
        while True:
            for problem in problems:
                if problem not in told:
                    print(problem, file=sys.stderr, flush=True)
            told.update(problems)
            time.sleep(SECONDS)
            try:
                gathered = gather(places)
            except UserError as error:
                # The runs may be away for a while: moved, or on a disk that is not mounted. The board keeps them.
                problems = [str(error)]
            else:
                problems = gathered.problems
                board.write(board_groups(gathered.runs))


if __name__ == "__main__":
    sys.exit(main())
