"""The pages of the API reference, opened from disk in a real browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/reference.py"


@pytest.mark.slow
def test_pages_show_signatures_lead_to_each_other_are_searched_and_ask_no_other_host(
    browser: Any, tmp_path: Path
) -> None:
    build = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, check=True)
    assert "Warn" not in done.stderr
    page = browser.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))

    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_url("**/rethink_prune.html")
    signature = " ".join(page.locator("#run_study .attr").inner_text().split())
    assert signature.startswith(
        "def run_study( config: Study | rethink_prune.config.StudyConfig, run_dir: pathlib.Path"
    )
    assert page.locator("#Study .docstring").first.inner_text().startswith("A study, composed and validated")

    page.get_by_role("link", name="pruning", exact=True).first.click()
    page.wait_for_url("**/pruning.html")
    page.get_by_role("link", name="thinet", exact=True).first.click()
    page.wait_for_url("**/pruning/thinet.html")
    assert page.locator("#ThiNet .docstring").first.inner_text()

    page.get_by_role("searchbox").fill("scratch_b_epochs")
    page.locator(".search-result").first.wait_for()
    assert "rethink_prune.study.budget.scratch_b_epochs" in page.locator(".search-result").first.inner_text()
    assert [complaint for complaint in complaints if not complaint.startswith("log: ")] == []
    assert {url.partition(":")[0] for url in requests} == {"file"}
    page.close()
