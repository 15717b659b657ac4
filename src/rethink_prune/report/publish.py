"""A report's files: Markdown, HTML, JSON, CSV, LaTeX and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.files import write_atomically, write_json
from rethink_prune.report.comparison import Report
from rethink_prune.report.grids import accuracy_grid, escape_markdown, report_grids, to_csv, to_latex, to_markdown
from rethink_prune.report.groups import Group
from rethink_prune.report.page import page
from rethink_prune.report.plots import Picture, draw, save
from rethink_prune.report.runs import FORMAT, FORMAT_VERSION, SUMMARY_FILE
from rethink_prune.tracking.tensorboard import write_aggregates

PAGE_FILE = "report.html"
TITLE = "Pruning and fine-tuning, or training from scratch"


def publish(report: Report, groups: Sequence[Group], folder: Path) -> None:
    """Write a report into `folder`, over one that is there.

    Writes ``report.html``, ``report.md``, ``results.json``, ``tables.tex``, a CSV file for each table, each picture as
    PNG and SVG, and ``tensorboard/``: the means over seeds.

    Parameters
    ----------
    report : Report
    groups : sequence of Group
        The runs it was worked out from, for ``results.json``: a later report can start from that file.
    folder : Path

    Raises
    ------
    UserError
        If the folder cannot be made or written, or is a run's own.
    """
    if (folder / SUMMARY_FILE).exists():
        raise UserError(f"--out {folder}: is a run's folder; name another one")
    if (folder / "tensorboard").exists() and not (folder / PAGE_FILE).exists():
        raise UserError(f"--out {folder}: holds a tensorboard folder that no report has made; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name a folder you can write") from None
    grids = report_grids(report)
    pictures = draw(report)
    save(pictures, folder)
    runs = [run.model_dump(mode="json", exclude_none=True) for group in groups for run in group.runs]
    results = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "made_by": f"rethink-prune {version('rethink-prune')}",
        **asdict(report),
        "runs": runs,
    }
    write_json(folder / "results.json", results)
    write_aggregates({_label(group): _curves(group) for group in groups}, folder / "tensorboard")
    texts = {f"{grid.name}.csv": to_csv(grid) for grid in grids}
    texts["tables.tex"] = to_latex(grids)
    texts["report.md"] = "\n\n".join([f"# {TITLE}", overview(report), *_details(report, pictures)]) + "\n"
    texts[PAGE_FILE] = page(report, grids, pictures, title=TITLE)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def overview(report: Report) -> str:
    """Return the tables of accuracies, the verdicts, and what was left out, as Markdown."""
    parts = []
    for table in report.tables:
        verdicts = [
            f"- {escape_markdown(f'{row.title}: {comparison.verdict}')}"
            for row in table.rows
            for comparison in row.comparisons
        ]
        parts += [to_markdown(accuracy_grid(table)), "\n".join(verdicts)]
    problems = "\n".join(f"- {escape_markdown(problem)}" for problem in report.problems)
    return "\n\n".join(filter(None, [*parts, problems and f"Left out:\n\n{problems}"]))


def _label(group: Group) -> str:
    settings = (f"{name}={value}" for name, value in group.by)
    study = (group.dataset, group.model, group.pruner, group.target, *settings)
    return " ".join([*study, f"{group.recipe} recipe", f"{group.budget} budget"])


def _curves(group: Group) -> dict[str, list[tuple[float, ...]]]:
    """Return, by arm, each seed's top-1 after every epoch."""
    curves: dict[str, list[tuple[float, ...]]] = {}
    for run in group.runs:
        for arm, trained in run.trained.items():
            if trained.curve is not None:
                curves.setdefault(arm, []).append(trained.curve)
    return curves


def _details(report: Report, pictures: Sequence[Picture]) -> Iterator[str]:
    yield from (to_markdown(grid) for grid in report_grids(report) if not grid.name.startswith("accuracy"))
    yield from (f"![{escape_markdown(picture.caption)}]({picture.name}.png)" for picture in pictures)
