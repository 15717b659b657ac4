"""``python -m rethink_prune.status STORE``: what is in a store, and how far it is."""

import argparse
import os
import sys
import time
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.store.listing import list_stages, stages_table
from rethink_prune.store.store import Store
from rethink_prune.text import size

# What wants attention comes first.
MOST_LISTED = 100


def main(arguments: list[str] | None = None) -> int:
    """Print the stages of a store, or remove those that nobody needs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="rethink-prune-status", description="What is in a store.")
    default = os.environ.get("RETHINK_PRUNE_STORE", "store")
    parser.add_argument("store", nargs="?", type=Path, default=Path(default), help="its folder (%(default)s)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print it again and again, until Ctrl-C")
    parser.add_argument("--clean", action="store_true", help="remove unfinished stages and those that no run uses")
    parser.add_argument("--yes", action="store_true", help="with --clean: do not ask")
    parser.add_argument("--all", action="store_true", help=f"list every stage, not the first {MOST_LISTED}")
    options = parser.parse_args(arguments)
    if options.watch is not None and not options.watch > 0:
        parser.error("--watch: must be more than 0")
    if options.watch is not None and options.clean:
        parser.error("--watch and --clean do not go together")
    try:
        if options.clean:
            _clean(options.store, ask=not options.yes)
            return 0
        while True:
            table = stages_table(options.store, list_stages(options.store), most=None if options.all else MOST_LISTED)
            # On a terminal, clear the screen first.
            print(f"\033[H\033[2J{table}" if options.watch and sys.stdout.isatty() else table, flush=True)
            if options.watch is None:
                return 0
            time.sleep(options.watch)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _clean(root: Path, *, ask: bool) -> None:
    store, removable = Store(root), [stage for stage in list_stages(root) if stage.removable]
    store.finish_removals()
    if not removable:
        print("Nothing to remove.")
        return
    print(stages_table(root, removable))
    freed = size(sum(stage.disk for stage in removable))
    if ask and input(f"\nRemove these {len(removable)} stages ({freed})? [y/N] ").strip().lower() not in ("y", "yes"):
        print("Nothing was removed.")
        return
    # A stage that a process has started to work on in the meantime stays.
    removed = [stage for stage in removable if store.remove_stage(stage.folder.name)]
    print(f"Removed {len(removed)} stages, {size(sum(stage.disk for stage in removed))}.")


if __name__ == "__main__":
    sys.exit(main())
