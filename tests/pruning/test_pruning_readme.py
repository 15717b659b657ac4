"""The tables of the pruning README are made from the pruners themselves, so a new pruner appears in them.

``PYTHONPATH=tests python tests/pruning/test_pruning_readme.py`` writes them anew.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from rethink_prune import pruning
from rethink_prune.config import ChannelOptions
from rethink_prune.pruning import PRUNERS

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "src/rethink_prune/pruning/README.md"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def facts(name: str) -> dict[str, str]:
    """Return what the docstring of a pruner's class says in lines such as ``:goes: channels``."""
    return dict(re.findall(r"^:(\w+): (.+)$", inspect.getdoc(PRUNERS[name]) or "", flags=re.MULTILINE))


def table_of_pruners() -> str:
    columns = ("`pruner=`", "what goes", "by", "looks at images", "trains its own way", "options of its own")
    lines = [row(*columns), "|---" * len(columns) + "|"]
    for name, pruner in PRUNERS.items():
        said = facts(name)
        source = f" ({said['source']})" if "source" in said else ""
        own = [
            f"`{option}`" for option in pruner.options_type.model_fields if option not in ChannelOptions.model_fields
        ]
        images = "yes" if pruner.needs_data else ""
        lines.append(row(f"`{name}`{source}", said["goes"], said["by"], images, said.get("trains", ""), ", ".join(own)))
    return "\n".join(lines) + "\n"


def table_of_variants() -> str:
    lines = [row("`pruner=`", "`model.name=`", "`pruner.variant=`"), "|---|---|---|"]
    for name, pruner in PRUNERS.items():
        for network, variants in pruner.variants.items():
            lines.append(row(f"`{name}`", f"`{network}`", ", ".join(f"`{variant}`" for variant in variants)))
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """Return the page with each table that follows a line ``<!-- name: made by ... -->`` made anew."""
    for name, table in (("pruners", table_of_pruners()), ("variants", table_of_variants())):
        page, count = re.subn(rf"(<!-- {name}: .*-->\n)(\|.*\n)*", lambda found, new=table: found[1] + new, page)
        assert count == 1, name
    return page


def test_the_tables_are_those_of_the_pruners() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text())


def test_every_pruner_says_what_it_does() -> None:
    for name, pruner in PRUNERS.items():
        assert pruner.name == name
        assert ("trains" in facts(name)) == pruner.trains_sparse
        module = inspect.getmodule(pruner)
        assert module is not None
        authors, _, year = facts(name).get("source", "").rpartition(" ")
        assert authors.split(" ")[0] in (module.__doc__ or ""), "its module names the publication"
        assert year in (module.__doc__ or "")


def test_a_pruner_is_one_file_and_one_yaml() -> None:
    """What the folder holds is what there is: no list names the pruners."""
    folder = Path(pruning.__file__).parent
    assert {path.stem for path in (CHECKOUT / "conf/pruner").glob("*.yaml")} == set(PRUNERS)
    assert all((folder / f"{name}.py").is_file() for name in PRUNERS)
    paper = ["l1", "thinet", "regression", "slimming", "sss", "magnitude", "soft_filter"]
    assert list(PRUNERS)[: len(paper)] == paper, "in the order of the paper's tables, others after them"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
