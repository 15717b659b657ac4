"""Build the API reference: static pages from the docstrings, by pdoc.

``python scripts/reference.py --out build/reference``, or ``make docs``; then open ``build/reference/index.html``.
"""

import argparse
import pkgutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pdoc

import rethink_prune


def main() -> None:
    """Build the pages of all modules."""
    parser = argparse.ArgumentParser(description="Build the API reference from the docstrings.")
    parser.add_argument("--out", type=Path, default=Path("build/reference"), help="folder of the pages (%(default)s)")
    options = parser.parse_args()
    # pdoc looks for the names of a package without importing them, and leaves out modules that `__all__` does not name.
    for name in rethink_prune.__all__:
        setattr(rethink_prune, name, getattr(rethink_prune, name))
    add_modules(rethink_prune)
    pdoc.render.configure(docformat="numpy", show_source=False, footer_text=f"rethink-prune {version('rethink-prune')}")
    pdoc.pdoc("rethink_prune", output_directory=options.out)
    print(f"Open {options.out / 'index.html'}")


def add_modules(package: Any) -> None:
    """Add the modules below a package to the names that it shows."""
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = info.name.rpartition(".")[2]
        if name == "__main__":
            continue
        module = import_module(info.name)
        if hasattr(package, "__all__"):
            package.__all__ = [*package.__all__, name]
        if info.ispkg:
            add_modules(module)


if __name__ == "__main__":
    main()
