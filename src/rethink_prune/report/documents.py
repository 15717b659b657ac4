"""A report's folder: pictures, data, and documents from ``templates/``: Markdown, HTML, LaTeX, CSV.

The page opens from disk: it loads nothing, and runs nothing but its own script.
"""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE, write_atomically, write_json
from rethink_prune.report.detection import DetectionTable
from rethink_prune.report.gather import FORMAT, FORMAT_VERSION
from rethink_prune.report.grids import Cell, Grid, detection_class_grids, pattern_grids, report_grids
from rethink_prune.report.groups import RunGroup
from rethink_prune.report.patterns import RowPattern
from rethink_prune.report.plots import Picture, detection_pictures, draw_patterns, draw_pictures
from rethink_prune.report.results import Report, ResultTable
from rethink_prune.report.statistics import EXACT_UP_TO, RESAMPLES
from rethink_prune.text import markdown

PAGE_FILE = "report.html"
TITLE = "Pruning and fine-tuning, or training from scratch"
_TEMPLATES = Path(__file__).with_name("templates")

# What would end a cell, begin markup, or be HTML.
_MARKDOWN = str.maketrans({**{letter: f"\\{letter}" for letter in "\\`*|"}, "<": "&lt;", ">": "&gt;"})
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    # At the start of a row, a bare bracket would be an option of the line break before it.
    | {"<": "$<$", ">": "$>$", "[": "{[}"}
)


def publish(
    report: Report,
    groups: Sequence[RunGroup],
    folder: Path,
    *,
    detections: Mapping[str, Path] | None = None,
    most_pictures: int | None = None,
) -> str:
    """Write a report into `folder`, over one that is there, and return its overview as Markdown.

    Writes ``report.html``, ``report.md``, ``results.json``, ``tables.tex``, a CSV file for each table, and each picture
    as PNG and SVG.

    Parameters
    ----------
    groups
        The runs it was computed from, for ``results.json``: a later report can start from that file.
    detections
        PNG files with what detectors found, by stage.
    most_pictures
        So many, and of tables and sweeps alone; all by default.

    Raises
    ------
    UserError
        If the folder cannot be made or written, or is a run's own.
    """
    _make_folder(folder)
    pictures = draw_pictures(report, most=most_pictures)
    if most_pictures is None:
        pictures += detection_pictures(report, detections or {})
    files, listing = _picture_files(pictures), folder / "results.json"
    grids = report_grids(report)
    overview = _write_overview(report, grids)
    documents = {name: text.encode() for name, text in _write_documents(report, grids, overview, pictures).items()}
    _write_files(files, listing, others=[*documents])
    runs = [run.model_dump(mode="json", exclude_none=True) for group in groups for run in group.runs]
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "made_by": f"rethink-prune {version('rethink-prune')}",
    }
    # What told groups apart, for whoever reads the runs again; in one line, which takes half the room.
    by = list(dict.fromkeys(name for group in groups for name, _ in group.by))
    header |= {"by": by, "files": sorted({*files, *documents})}
    write_json(listing, {**header, **asdict(report), "runs": runs}, indent=None)
    # The page is the last file: where it stands, the report is whole.
    for name, data in documents.items():
        write_atomically(folder / name, data)
    return overview


def _picture_files(pictures: Sequence[Picture]) -> dict[str, bytes]:
    found = ((f"{p.name}.{kind}", getattr(p, kind)) for p in pictures for kind in ("png", "svg"))
    return {name: data for name, data in found if data}


def _write_files(files: Mapping[str, bytes], listing: Path, others: Sequence[str] = ()) -> None:
    """Write files beside the JSON file that lists those from before, which go unless they are among `others`."""
    for name in _listed_files(listing) - {*files, *others}:
        (listing.parent / name).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomically(listing.parent / name, data)


def _listed_files(listing: Path) -> set[str]:
    """Return the names of what was left in a folder, as far as it was said: old pictures would pass for new ones."""
    try:
        files = json.loads(listing.read_text())["files"]
        return {name for name in files if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_overview(report: Report, every: Sequence[Grid]) -> str:
    """Return the tables of accuracies and of detection, the verdicts, and what was left out, as Markdown."""
    grids = {grid.name: grid for grid in every}
    tables = [
        (table, grids[f"accuracy-{number}"], _with_grids(table, number, grids))
        for number, table in enumerate(report.tables, 1)
    ]
    return _ENVIRONMENT.get_template("overview.md.jinja").render(tables=tables, problems=report.problems).strip()


def _with_grids(table: ResultTable, number: int, grids: Mapping[str, Grid]) -> list[tuple[DetectionTable, Grid]]:
    return [(found, grids[f"detection-{number}-{place}"]) for place, found in enumerate(table.detection, 1)]


def _write_documents(
    report: Report, grids: Sequence[Grid], overview: str, pictures: Sequence[Picture]
) -> dict[str, str]:
    """Return every document of a report as text, by its file name; the page is the last."""
    script, style = ((_TEMPLATES / name).read_text() for name in ("page.js", "page.css"))
    # No other script, style or address is admitted, whatever gets into the page.
    policy = f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    values = {"title": TITLE, "report": report, "overview": overview, "grids": grids}
    values |= {"pictures": pictures, "script": script, "style": style, "policy": policy}
    values |= {"exact_up_to": EXACT_UP_TO, "resamples": RESAMPLES}
    templates = {"tables.tex": "tables.tex.jinja", "report.md": "report.md.jinja", PAGE_FILE: "page.html"}
    documents = {name: _ENVIRONMENT.get_template(template).render(values) for name, template in templates.items()}
    return {f"{grid.name}.csv": to_csv(grid) for grid in [*grids, *detection_class_grids(report)]} | documents


def publish_patterns(patterns: Sequence[RowPattern], folder: Path) -> str:
    """Write what pruning leaves into `folder`, and return it as Markdown.

    Writes ``patterns.json``, a CSV file for each table, and each picture as PNG and SVG, over what is there.

    Raises
    ------
    UserError
        If no row has layers, or the folder cannot be made or written, or is a run's own.
    """
    if not any(pattern.widths or pattern.kernels for pattern in patterns):
        raise UserError("these runs recorded no layers; run a study until it has pruned")
    _make_folder(folder)
    grids = pattern_grids(patterns)
    files = {f"{grid.name}.csv": to_csv(grid).encode() for grid in grids} | _picture_files(draw_patterns(patterns))
    listing = folder / "patterns.json"
    _write_files(files, listing)
    write_json(listing, {"files": sorted(files), "patterns": [asdict(pattern) for pattern in patterns]}, indent=None)
    told = [escape_markdown(f"{pattern.title}: {pattern.unknown}.") for pattern in patterns if pattern.unknown]
    tables = [f"## {grid.title}\n\n{_markdown_table(grid)}\n\n{grid.caption}" for grid in grids]
    return "\n\n".join([*tables, *told])


def _make_folder(folder: Path) -> None:
    if (folder / SUMMARY_FILE).exists():
        raise UserError(f"--out {folder}: is a run's folder; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name a folder you can write") from None


def to_csv(grid: Grid) -> str:
    """Return a grid as CSV with all digits; a mean has columns of its own for standard deviation and n."""
    columns = zip(*grid.rows, strict=True)
    parts = [list(dict.fromkeys(part for cell in column for part in cell.parts)) or [""] for column in columns]
    text = io.StringIO()
    # The default line end is that of Windows, on every system.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f"{name}{part}" for name, its in zip(grid.columns, parts, strict=True) for part in its])
    for row in grid.rows:
        writer.writerow([cell.parts.get(part, cell.text) for cell, its in zip(row, parts, strict=True) for part in its])
    return text.getvalue()


def escape_markdown(text: str) -> str:
    r"""Return `text` with nothing in it that Markdown or HTML would take for its own.

    Examples
    --------
    >>> print(escape_markdown("a|b <c> [d](e)"))
    a\|b &lt;c&gt; [d]\(e)
    """
    # Brackets alone, as around intervals, make no link.
    return text.translate(_MARKDOWN).replace("](", "]\\(").replace("]:", "]\\:")


def escape_latex(text: str) -> str:
    r"""Return `text` as LaTeX shows it; letters beyond ASCII become question marks.

    Examples
    --------
    >>> print(escape_latex("50 % of a_b ± 0.1"))
    50 \% of a\_b $\pm$ 0.1
    """
    # Other letters would need packages of their own.
    return text.translate(_LATEX).encode("ascii", "replace").decode()


def _markdown_table(grid: Grid) -> str:
    rows = [[f"**{escape_markdown(c.text)}**" if c.bold else escape_markdown(c.text) for c in row] for row in grid.rows]
    return markdown(grid.columns, rows)


def _latex_row(row: Sequence[Cell]) -> str:
    return " & ".join(f"\\textbf{{{escape_latex(c.text)}}}" if c.bold else escape_latex(c.text) for c in row)


def _data_uri(picture: Picture) -> str:
    kind, data = ("png", picture.png) if not picture.svg else ("svg+xml", picture.svg)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    # Names come from summaries that somebody else may have written.
    autoescape=select_autoescape(["html"]),
    # A misspelt name in a template is an error; by default it would be empty text.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"markdown": escape_markdown, "markdown_table": _markdown_table}
_ENVIRONMENT.filters |= {"latex": escape_latex, "latex_row": _latex_row, "data_uri": _data_uri}
