"""The board: what it writes is read back from its event files, and seen in TensorBoard in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

import rethink_prune.study.stages
from harness import SMALL, configure
from rethink_prune.board import main
from rethink_prune.errors import UserError
from rethink_prune.report.curves import board_groups
from rethink_prune.report.gather import gather
from rethink_prune.store.metrics import write_metrics
from rethink_prune.study.run import run_study
from rethink_prune.tracking.board import BoardFolder
from rethink_prune.training.interrupts import Interrupts

WriteRun = Callable[..., Path]

ARMS = {"large": 94.0, "finetune": 93.0, "scratch_e": 92.5, "scratch_b": 94.5}
BY_EPOCH = "accuracy top-1 by epoch"
BY_FLOPS = "accuracy top-1 by training GFLOPs"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardFolder]:
    folder = BoardFolder(tmp_path / "board")
    yield folder
    folder.close()


def show(board: BoardFolder, *places: Path) -> None:
    board.write(board_groups(gather(places).runs))


def runs_shown(folder: Path) -> dict[str, Path]:
    """Return the event file of each run, by the run's name."""
    return {path.parent.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*tfevents*"))}


def points(folder: Path, run: str, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder / run)).Reload()
    if tag not in read.Tags()["scalars"]:
        return []
    return [(point.step, pytest.approx(point.value, abs=1e-4)) for point in read.Scalars(tag)]


def labels(folder: Path) -> list[str]:
    """Return the headings of Custom scalars."""
    found = [EventAccumulator(str(path.parent)).Reload() for path in runs_shown(folder).values()]
    (told,) = [read for read in found if "custom_scalars__config__" in read.Tags()["tensors"]]
    layout = Layout.FromString(told.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    return [category.title for category in layout.category]


def leave_unfinished(run: Path, arm: str, top1: list[float], *, epochs: int) -> None:
    """Make an arm of a written run one that is trained now."""
    summary = json.loads((run / "summary.json").read_text())
    entry = summary["arms"].pop(arm)
    write_metrics(Path(entry["stage"]), [{"epoch": e, "test_top1": value} for e, value in enumerate(top1, 1)])
    kept = {name: entry[name] for name in ("train_flops", "train_flops_total", "stage")}
    summary["unfinished"] = {arm: {**kept, "status": "unfinished", "epochs": epochs}}
    (run / "summary.json").write_text(json.dumps(summary))


def test_a_group_has_the_mean_and_the_band_of_its_seeds_and_every_seed(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    for seed, top1 in enumerate((90.0, 92.0, 94.0)):
        write_run(seed, {"large": 95.0, "finetune": top1}, target={"ratio": 0.3})
    show(board, tmp_path / "runs")
    assert labels(board.folder) == ["vgg16 l1 0.3, 3 seeds"]
    names = [f"{arm}/{name}" for arm in ("finetune", "large") for name in ("mean", "seed 0", "seed 1", "seed 2")]
    assert sorted(runs_shown(board.folder)) == names
    read = {
        name: points(board.folder, "finetune/mean", tag)
        for name, tag in (
            ("mean", f"vgg16 l1 0.3/{BY_EPOCH}"),
            ("least", f"~ band of vgg16 l1 0.3/least {BY_EPOCH}"),
            ("greatest", f"~ band of vgg16 l1 0.3/greatest {BY_EPOCH}"),
        )
    }
    assert {name: line[-1] for name, line in read.items()} == {
        "mean": (4, 92.0),
        "least": (4, 90.0),
        "greatest": (4, 94.0),
    }
    assert [step for step, _ in read["mean"]] == [1, 2, 3, 4]
    assert points(board.folder, "finetune/seed 2", f"vgg16 l1 0.3/{BY_EPOCH}")[-1] == (4, 94.0)
    # Fine-tuning starts where the unpruned network's training ended.
    by_flops = points(board.folder, "finetune/mean", f"vgg16 l1 0.3/{BY_FLOPS}")
    assert [step for step, _ in by_flops] == [2_250_000, 2_500_000, 2_750_000, 3_000_000]


def test_a_seed_that_is_trained_shows_and_leaves_the_mean_of_the_finished(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    write_run(0, {"large": 94.0, "scratch_b": 92.0})
    leave_unfinished(write_run(1, {"large": 94.0, "scratch_b": 0.0}), "scratch_b", [50.0, 60.0], epochs=4)
    show(board, tmp_path / "runs")
    tag = f"vgg16 l1 0.5/{BY_EPOCH}"
    assert points(board.folder, "scratch_b/seed 1", tag) == [(1, 50.0), (2, 60.0)]
    assert points(board.folder, "scratch_b/mean", tag)[-1] == (4, 92.0)
    # Two of its four epochs: half of its FLOPs.
    assert points(board.folder, "scratch_b/seed 1", f"vgg16 l1 0.5/{BY_FLOPS}")[-1] == (500_000, 60.0)


def test_before_a_seed_has_finished_the_mean_goes_as_far_as_all_have_come(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    for seed, top1 in enumerate(([50.0, 60.0, 70.0], [52.0])):
        leave_unfinished(write_run(seed, {"scratch_b": 0.1 * seed}), "scratch_b", top1, epochs=4)
    show(board, tmp_path / "runs")
    assert points(board.folder, "scratch_b/mean", f"vgg16 l1 0.5/{BY_EPOCH}") == [(1, 51.0)]
    assert points(board.folder, "scratch_b/mean", f"vgg16 l1 0.5/{BY_FLOPS}") == [(250_000, 51.0)]


def test_new_epochs_are_added_and_a_new_seed_replaces_the_mean(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    run = write_run(0, {"large": 94.0, "scratch_b": 0.0})
    leave_unfinished(run, "scratch_b", [50.0], epochs=4)
    show(board, tmp_path / "runs")
    before = runs_shown(board.folder)
    stage = Path(json.loads((run / "summary.json").read_text())["unfinished"]["scratch_b"]["stage"])
    write_metrics(stage, [{"epoch": 1, "test_top1": 50.0}, {"epoch": 2, "test_top1": 60.0}])
    show(board, tmp_path / "runs")
    assert runs_shown(board.folder) == before
    tag = f"vgg16 l1 0.5/{BY_EPOCH}"
    assert points(board.folder, "scratch_b/mean", tag) == [(1, 50.0), (2, 60.0)]
    write_run(1, {"large": 92.0, "scratch_b": 90.0})
    show(board, tmp_path / "runs")
    assert points(board.folder, "large/mean", tag)[-1] == (4, 93.0)
    assert len(points(board.folder, "large/mean", tag)) == 4
    after = runs_shown(board.folder)
    assert after["large/mean"].name > before["large/mean"].name
    assert after["large/seed 0"] == before["large/seed 0"]


def test_labels_say_what_differs_and_no_more(write_run: WriteRun, tmp_path: Path, board: BoardFolder) -> None:
    write_run(0, {"finetune": 93.0}, target={"ratio": 0.3})
    write_run(0, {"finetune": 93.0}, target={"ratio": 0.5}, settings={"recipe": {"lr": 0.1}})
    write_run(0, {"finetune": 93.0}, target={"ratio": 0.5}, settings={"recipe": {"lr": 0.2}})
    show(board, tmp_path / "runs")
    assert labels(board.folder) == [
        "vgg16 l1 0.3, 1 seed",
        "vgg16 l1 0.5 recipe.lr 0.1, 1 seed",
        "vgg16 l1 0.5 recipe.lr 0.2, 1 seed",
    ]
    write_run(0, {"finetune": 93.0}, target={"variant": "A"}, dataset="digits", precision="bf16")
    show(board, tmp_path / "runs")
    assert "vgg16 l1 variant A digits bf16, 1 seed" in labels(board.folder)
    assert "vgg16 l1 ratio 0.3 cifar10 fp32, 1 seed" in labels(board.folder)


def test_labels_that_differ_in_what_no_tag_can_hold_stay_apart(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    for model in ("a/b", "a(b", "x" * 50 + "1", "x" * 50 + "2"):
        write_run(0, {"finetune": 93.0}, model=model)
    show(board, tmp_path / "runs")
    long = "x" * 37 + "..."
    found = ["a_b l1 0.5, 1 seed", "a_b l1 0.5 no. 2, 1 seed", f"{long} l1 0.5, 1 seed", f"{long} l1 0.5 no. 2, 1 seed"]
    assert sorted(labels(board.folder)) == sorted(found)


def test_a_seed_that_was_trained_again_counts_once_and_the_last_time(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    write_run(0, {"finetune": 93.0}, folder="a")
    write_run(0, {"finetune": 91.0}, folder="b")
    show(board, tmp_path / "runs")
    assert labels(board.folder) == ["vgg16 l1 0.5, 1 seed"]
    assert points(board.folder, "finetune/mean", f"vgg16 l1 0.5/{BY_EPOCH}")[-1] == (4, 91.0)


@pytest.mark.parametrize("name", ["../../../outside", "/etc/outside", "..", "a:b?*", "naïve <b>\n"])
def test_names_of_others_are_names_of_folders_inside(
    name: str, write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    write_run(0, {"finetune": 93.0}, model=name)
    run = write_run(1, {"finetune": 93.0}, model=name)
    summary = json.loads((run / "summary.json").read_text())
    # A training of its own, of that name.
    stage = Path(summary["arms"]["finetune"]["stage"])
    summary["arms"][name] = {**summary["arms"]["finetune"], "stage": str(shutil.copytree(stage, tmp_path / "other"))}
    (run / "summary.json").write_text(json.dumps(summary))
    show(board, tmp_path / "runs")
    found = [path.relative_to(board.folder) for path in tmp_path.rglob("*tfevents*")]
    assert len(found) == 5
    assert all(len(path.parts) == 3 and re.fullmatch(r"[\w., +=-]+", path.parts[0]) for path in found)


def test_the_folder_keeps_what_is_not_its_own(write_run: WriteRun, tmp_path: Path) -> None:
    kept = tmp_path / "board/large/mean/events.out.tfevents.1.host"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    write_run(0, ARMS)
    for _ in range(2):
        board = BoardFolder(tmp_path / "board")
        show(board, tmp_path / "runs")
        board.close()
    assert kept.read_text() == "mine"
    assert len(list(kept.parent.iterdir())) == 2


def test_two_boards_do_not_share_a_folder(tmp_path: Path, board: BoardFolder) -> None:
    with pytest.raises(UserError, match="another board uses it; name another folder"):
        BoardFolder(board.folder)


def test_what_is_wrong_is_said_in_one_line(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments, "--out", str(tmp_path / "board")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.chdir(tmp_path)
    assert refused().startswith("runs: no such folder; run a study first")
    (tmp_path / "runs").mkdir()
    assert refused().startswith("runs: holds no summary.json")
    write_run(0, ARMS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refused("--port", port).startswith(f"--port {port}: cannot be used (")
    (tmp_path / "board/board.lock").unlink()
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 1
    assert "file: cannot be written (File exists); name another folder" in capsys.readouterr().err


def test_a_study_shows_every_epoch_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each epoch of a real study, in the order in which its stages run."""
    seen: list[tuple[str, int]] = []
    board = BoardFolder(tmp_path / "board")

    def write_and_look(folder: Path, rows: list[Mapping[str, float]]) -> None:
        write_metrics(folder, rows)
        show(board, tmp_path / "run")
        arm = folder.name.partition("-")[0]
        name = {"scratch": "scratch_e"}.get(arm, arm)
        seen.append((name, len(points(board.folder, f"{name}/mean", f"resnet20 l1 0.5/{BY_EPOCH}"))))

    monkeypatch.setattr(rethink_prune.study.stages, "write_metrics", write_and_look)
    config = configure(*SMALL, f"store.root={tmp_path / 'store'}", "arms=[finetune,scratch_e]")
    with Interrupts() as interrupts:
        summary = run_study(config, tmp_path / "run", interrupts)
    board.close()
    assert seen == [("large", 1), ("large", 2), ("finetune", 1), ("scratch_e", 1), ("scratch_e", 2)]
    assert "unfinished" not in summary
    assert "unfinished" not in json.loads((tmp_path / "run/summary.json").read_text())


class Board:
    """The command, running over a folder of runs."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address
        self.root = address.partition("?")[0]

    def tensorboard(self, path: str) -> Any:
        """Return what TensorBoard's back end answers."""
        with urllib.request.urlopen(f"{self.root}data/{path}", timeout=60) as answer:
            return json.load(answer)

    def wait_for(self, path: str, done: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + 120
        while not done(content := self.tensorboard(path)):
            assert time.monotonic() < deadline, content
            time.sleep(0.3)
        return content


@contextmanager
def started(runs: Path, out: Path) -> Iterator[Board]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rethink_prune.board", str(runs), "--out", str(out), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # A shell lets what it starts in the background ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    # A board that says nothing would keep the test waiting.
    watchdog = threading.Timer(180, process.kill)
    watchdog.start()
    try:
        found = re.match(r"Open (http://127\.0\.0\.1:\d+/\S+)", process.stdout.readline())
        assert found
        yield Board(process, found[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_tensorboard_takes_up_new_runs_and_ends_with_the_board(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(0, ARMS)
    query = f"run=large%2Fmean&tag={urllib.request.quote(f'vgg16 l1 0.5/{BY_EPOCH}')}"
    with started(tmp_path / "runs", tmp_path / "board") as board:
        assert len(board.wait_for(f"plugin/scalars/scalars?{query}", lambda curve: len(curve) == 4)) == 4
        write_run(1, {arm: top1 - 1 for arm, top1 in ARMS.items()})
        names = [*(f"{arm}/mean" for arm in ARMS), *(f"{arm}/seed {seed}" for arm in ARMS for seed in (0, 1))]
        # In this order TensorBoard lists and colours them.
        board.wait_for("runs", lambda runs: runs == names)
        curve = board.wait_for(f"plugin/scalars/scalars?{query}", lambda curve: curve[-1][2] == 93.5)
        assert [step for _, step, _ in curve] == [1, 2, 3, 4]
        (category,) = board.wait_for(
            "plugin/custom_scalars/layout", lambda layout: "2 seeds" in layout["category"][0]["title"]
        )["category"]
        assert len(category["chart"]) == 2
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(board.root, timeout=10)


def sweep(write_run: WriteRun, ratios: int, seeds: int) -> None:
    for ratio in range(1, ratios + 1):
        for seed in range(seeds):
            write_run(seed, {arm: top1 - seed / 2 for arm, top1 in ARMS.items()}, target={"ratio": ratio / 50})


@pytest.mark.parametrize(
    ("ratios", "seeds"),
    [(1, 1), pytest.param(2, 4, marks=pytest.mark.slow), pytest.param(20, 2, marks=pytest.mark.slow)],
    ids=["one study", "eight", "forty"],
)
def test_the_first_page_shows_four_lines_with_bands_for_each_group(
    ratios: int, seeds: int, write_run: WriteRun, tmp_path: Path, browser: Any
) -> None:
    sweep(write_run, ratios, seeds)
    with started(tmp_path / "runs", tmp_path / "board") as board:
        board.wait_for("runs", lambda runs: len(runs) == 4 * (1 + seeds))
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(board.address)
        charts = page.locator("tf-custom-scalar-margin-chart-card")
        # The last chart is the last to be drawn.
        charts.nth(2 * ratios - 1).locator("path.area").nth(3).wait_for(state="attached")
        assert charts.count() == 2 * ratios
        colors = set()
        for number in range(2 * ratios):
            chart = charts.nth(number)
            lines = chart.locator("path.line").evaluate_all("paths => paths.map((path) => path.getAttribute('d'))")
            assert sum(len(line or "") > 20 for line in lines) >= 4
            fills = chart.locator("path.area").evaluate_all("paths => paths.map((path) => path.getAttribute('fill'))")
            assert len(set(fills)) == 4
            colors.add(tuple(fills))
            assert chart.get_by_text("Matches (4)").count() == 1
            assert chart.get_by_text("Missing Tags").is_visible() is False
        assert len(colors) == 1
        assert charts.evaluate_all("charts => charts.map((chart) => chart.title)") == [BY_EPOCH, BY_FLOPS] * ratios
        headings = page.locator("tf-category-paginated-view .heading").all_inner_texts()
        counted = f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
        wanted = [f"vgg16 l1 {ratio / 50}, {counted}" for ratio in range(1, ratios + 1)]
        assert [heading.splitlines()[0] for heading in headings] == wanted
        boxes = page.locator("tf-multi-checkbox paper-checkbox")
        assert boxes.count() == page.locator("tf-multi-checkbox paper-checkbox[checked]").count() == 4
        assert page.locator("tf-multi-checkbox .name-row").all_inner_texts() == [f"{arm}/mean" for arm in ARMS]
        look_at_time_series(page, ratios, seeds)
        page.close()


def line_colors(picture: bytes) -> list[tuple[int, ...]]:
    """Return the colours, other than shades of grey, that many pixels have."""
    found = Image.open(io.BytesIO(picture)).convert("RGB").getcolors(maxcolors=1 << 24)
    return [color for count, color in found if count >= 30 and max(color) - min(color) > 25]


def look_at_time_series(page: Any, ratios: int, seeds: int) -> None:
    """See that the means are ticked there too, that each chart has their lines, and that seeds are one step away."""
    page.get_by_text("Time Series", exact=True).first.click()
    first = page.locator("scalar-card").first
    deadline = time.monotonic() + 30
    # These lines are pixels: TensorBoard draws them on a canvas.
    while len(colors := line_colors(first.locator("line-chart").screenshot())) < 4:
        assert time.monotonic() < deadline, colors
    groups = [name for name in page.locator(".group-title").all_inner_texts() if name != "Pinned"]
    assert groups[:2] == ["vgg16 l1 0.02", "vgg16 l1 0.04" if ratios > 1 else "~ band of vgg16 l1 0.02"]
    text = first.inner_text().replace("\n", "")
    assert text.startswith(f"vgg16 l1 0.02/{BY_EPOCH}")
    assert all(f"{arm}/mean" in text for arm in ARMS)
    rows = page.locator("runs-data-table tb-data-table-content-row")
    ticked = "runs-data-table tb-data-table-content-row .mat-mdc-checkbox-checked"
    assert rows.count() == page.locator(ticked).count() == 4
    page.locator("runs-data-table input[type=text], runs-data-table tb-filter-input input").first.fill("")
    rows.nth(4).wait_for()
    page.wait_for_function(f"document.querySelectorAll('{ticked}').length === {4 * (1 + seeds)}")


def test_detectors_have_charts_of_their_own_whichever_runs_were_transferred(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    write_run(0, {"finetune": 92.0}, transfer={"prune_c": 70.0, "scratch_e": 68.0})
    write_run(1, {"finetune": 94.0}, transfer={"prune_c": 71.0})
    write_run(2, {"finetune": 96.0})
    show(board, tmp_path / "runs")
    assert labels(board.folder) == ["vgg16 l1 0.5, 3 seeds", "vgg16 l1 0.5 on voc, 2 seeds"]
    assert points(board.folder, "finetune/mean", f"vgg16 l1 0.5/{BY_EPOCH}")[-1] == (4, 94.0)
    names = [name for name in sorted(runs_shown(board.folder)) if name.startswith("detect_")]
    assert names == [
        *(f"detect_prune_c/{name}" for name in ("mean", "seed 0", "seed 1")),
        *(f"detect_scratch_e/{name}" for name in ("mean", "seed 0")),
    ]
    tag = "vgg16 l1 0.5 on voc/average precision mAP by"
    assert points(board.folder, "detect_prune_c/mean", f"{tag} epoch") == [(1, 68.5), (2, 69.5), (3, 70.5)]
    # What it builds on took 5e15.
    assert points(board.folder, "detect_scratch_e/mean", f"{tag} training GFLOPs") == [
        *((6_000_000, 66.0), (7_000_000, 67.0), (8_000_000, 68.0)),
    ]


def test_transfers_that_differ_are_groups_and_their_arms_are_not(
    write_run: WriteRun, tmp_path: Path, board: BoardFolder
) -> None:
    for seed, lr in enumerate((0.001, 0.002)):
        write_run(seed, {"finetune": 92.0}, transfer={"prune_c": 70.0}, pictures={"lr": lr})
    show(board, tmp_path / "runs")
    assert labels(board.folder) == [
        "vgg16 l1 0.5, 2 seeds",
        *(f"vgg16 l1 0.5 on voc transfer.lr {lr}, 1 seed" for lr in (0.001, 0.002)),
    ]


def test_a_detector_that_is_trained_shows(write_run: WriteRun, tmp_path: Path, board: BoardFolder) -> None:
    run = write_run(0, {"finetune": 92.0}, transfer={"prune_c": 70.0})
    summary = json.loads((run / "summary.json").read_text())
    entry = summary.pop("transfer")["prune_c"]
    kept = {name: entry[name] for name in ("train_flops", "train_flops_total", "stage")}
    summary["unfinished"] = {"detect_prune_c": {**kept, "status": "unfinished", "epochs": 6}}
    (run / "summary.json").write_text(json.dumps(summary))
    show(board, tmp_path / "runs")
    tag = "vgg16 l1 0.5 on voc/average precision mAP by"
    assert points(board.folder, "detect_prune_c/seed 0", f"{tag} epoch") == [(1, 68.0), (2, 69.0), (3, 70.0)]
    assert points(board.folder, "detect_prune_c/seed 0", f"{tag} training GFLOPs")[-1] == (6_500_000, 70.0)
