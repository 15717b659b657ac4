"""The page, opened from disk in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rethink_prune.report.__main__ import main

WriteRun = Callable[..., Path]

HOSTILE = "<img src=x onerror=alert(1)>\"'&</td></style></script><script>alert(2)</script>-->{{ 7 * 7 }}"


class Opened:
    """A page in the browser, and what it complained about or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state()
        return self.page


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    page = browser.new_page()
    yield Opened(page)
    page.close()


def column(page: Any, name: str) -> list[str]:
    """Return the texts of a column of the first table, in the order shown."""
    headings = page.locator("table").first.locator("th").all_inner_texts()
    cells = page.locator("table").first.locator(f"tbody td:nth-child({headings.index(name) + 1})")
    return cells.all_inner_texts()


def sort_by(page: Any, name: str) -> str:
    page.locator("table").first.get_by_role("button", name=name, exact=True).click()
    return page.locator("table").first.locator("th[aria-sort]").get_attribute("aria-sort")


def test_it_loads_alone_and_without_errors_and_shows_its_pictures(written: Path, opened: Opened) -> None:
    page = opened.open(written / "report.html")
    assert opened.complaints == []
    assert opened.requests == [(written / "report.html").as_uri()]
    widths = page.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
    assert len(widths) == len(list(written.glob("*.svg")))
    assert all(width > 100 for width in widths)
    assert all(page.evaluate("[...document.images].map((image) => image.alt)"))


def test_tables_sort_by_numbers_and_by_text_both_ways_with_empty_cells_last(written: Path, opened: Opened) -> None:
    page = opened.open(written / "report.html")
    assert sort_by(page, "Scratch-E") == "ascending"
    assert [text[:5] for text in column(page, "Scratch-E")] == ["92.60", "92.60", ""]
    assert sort_by(page, "fine-tuned") == "ascending"
    assert [text[:5] for text in column(page, "fine-tuned")] == ["93.30", "93.50", ""]
    assert sort_by(page, "fine-tuned") == "descending"
    assert [text[:5] for text in column(page, "fine-tuned")] == ["93.50", "93.30", ""]
    assert sort_by(page, "pruned by") == "ascending"
    assert column(page, "pruned by") == ["l1 ratio 0.3", "l1 ratio 0.5", "l1 variant A"]
    assert page.locator("th[aria-sort]").count() == 1
    assert opened.complaints == []


def test_hostile_names_are_text(write_run: WriteRun, tmp_path: Path, opened: Opened) -> None:
    names = dict.fromkeys(("model", "dataset", "recipe", "budget", "experiment", "device"), HOSTILE)
    write_run(0, {"large": 94.0, "finetune": 93.0, HOSTILE: 92.0, "scratch_b": HOSTILE}, **names)
    write_run(1, {"large": 94.0, "finetune": 93.0, HOSTILE: 92.5}, **{**names, "device": "other"})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    page = opened.open(tmp_path / "report/report.html")
    assert opened.complaints == []
    assert column(page, "network") == [HOSTILE]
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("[...document.images].every((image) => image.src.startsWith('data:image/svg+xml;base64,'))")
    # In a browser of its own, so that the policy of the page has no part in it.
    for picture in (tmp_path / "report").glob("*.svg"):
        opened.open(picture)
    assert opened.complaints == []


def test_the_policy_admits_nothing_that_is_put_into_the_page(written: Path, tmp_path: Path, opened: Opened) -> None:
    file = tmp_path / "changed.html"
    text = (written / "report.html").read_text()
    file.write_text(text.replace("</h1>", "</h1><script>alert(3)</script><img src='http://127.0.0.1:9/x.png'>", 1))
    opened.open(file)
    assert len(opened.complaints) == 2
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)


def test_a_wide_table_fits_into_a_window_of_1300_pixels(browser: Any, write_run: WriteRun, tmp_path: Path) -> None:
    arms = ["large", "finetune", "scratch_e", "scratch_b", "large_longer", "an_arm", "another_arm", "a_third_arm"]
    for seed in range(3):
        target = {"ratio": {"layer1.*": 0.3, "layer2.*": 0.5, "layer3.*": 0.7}}
        write_run(seed, {arm: 93 + seed / 7 for arm in arms}, model="torchvision.models:resnet50", target=target)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto((tmp_path / "report/report.html").as_uri())
    measure = "tables => tables.map(table => [table.offsetWidth, table.parentElement.clientWidth])"
    sizes = page.locator("table").evaluate_all(measure)
    assert len(sizes) == 3
    assert all(table <= place for table, place in sizes), sizes
    assert page.evaluate("document.documentElement.scrollWidth") <= 1300
    page.close()
