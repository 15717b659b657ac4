"""Write a report's folder: documents, pictures, data and TensorBoard files."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rethink_prune.errors import UserError
from rethink_prune.files import SUMMARY_FILE, write_atomically, write_json
from rethink_prune.report.board import seed_curves, write_seed_curves
from rethink_prune.report.documents import PAGE_FILE, write_documents
from rethink_prune.report.gather import FORMAT, FORMAT_VERSION
from rethink_prune.report.groups import RunGroup
from rethink_prune.report.plots import draw_pictures
from rethink_prune.report.results import Report


def publish(report: Report, groups: Sequence[RunGroup], folder: Path) -> None:
    """Write a report into `folder`, over one that is there.

    Writes ``report.html``, ``report.md``, ``results.json``, ``tables.tex``, a CSV file for each table, each picture as
    PNG and SVG, and ``tensorboard/``: the means over seeds.

    Parameters
    ----------
    groups
        The runs it was computed from, for ``results.json``: a later report can start from that file.

    Raises
    ------
    UserError
        If the folder cannot be made or written, or is a run's own.
    """
    if (folder / SUMMARY_FILE).exists():
        raise UserError(f"--out {folder}: is a run's folder; name another one")
    # The tensorboard folder is replaced, so it must be a report's.
    if (folder / "tensorboard").exists() and not (folder / PAGE_FILE).exists():
        raise UserError(f"--out {folder}: holds a tensorboard folder that no report has made; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name a folder you can write") from None
    pictures = draw_pictures(report)
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.png)
        write_atomically(folder / f"{picture.name}.svg", picture.svg)
    runs = [run.model_dump(mode="json", exclude_none=True) for group in groups for run in group.runs]
    header = {"format": FORMAT, "version": FORMAT_VERSION, "made_by": f"rethink-prune {version('rethink-prune')}"}
    write_json(folder / "results.json", {**header, **asdict(report), "runs": runs})
    write_seed_curves(seed_curves(groups), folder / "tensorboard")
    # The page is the last file: where it stands, the report is whole.
    for name, text in write_documents(report, pictures).items():
        write_atomically(folder / name, text.encode())
