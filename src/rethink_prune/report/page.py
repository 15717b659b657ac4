"""A report as one HTML file that opens from disk: it loads nothing, and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rethink_prune.report.comparison import Report
from rethink_prune.report.grids import Grid
from rethink_prune.report.plots import Picture
from rethink_prune.report.statistics import EXACT_UP_TO, RESAMPLES

_FOLDER = Path(__file__).with_name("templates")


def page(report: Report, grids: Sequence[Grid], pictures: Sequence[Picture], *, title: str) -> str:
    """Return the page; every name in it is escaped, and its policy admits no other script, style or address."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((_FOLDER / name).read_text() for name in ("page.js", "page.css"))
    return environment.get_template("page.html").render(
        title=title,
        report=report,
        grids=grids,
        pictures=[(picture, _data_uri(picture.svg)) for picture in pictures],
        script=script,
        style=style,
        policy=f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'",
        exact_up_to=EXACT_UP_TO,
        resamples=RESAMPLES,
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
