"""What TensorBoard shows: read back from its event files, and through its own back ends."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard import program
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

from rethink_prune.tracking.tensorboard import ArmEvents, write_seed_curves, write_study

Run = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(point.step, pytest.approx(point.value)) for point in events(folder).Scalars(tag)]


def texts(folder: Path, tag: str) -> str:
    (event,) = events(folder).Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def rows(*top1: float) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "lr": 0.1, "images": 10, "train_loss": 1 / epoch, "train_top1": value, "test_loss": 2.0}
        | {"test_top1": value, "seconds": 1.0}
        for epoch, value in enumerate(top1, 1)
    ]


class HParams:
    """TensorBoard's own HParams back end over a log folder."""

    def __init__(self, logdir: Path) -> None:
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(logdir))
        multiplexer.Reload()
        self._context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logdir))))

    def columns(self) -> tuple[set[str], set[str]]:
        """Return the names of hyper-parameters and of metrics."""
        found = GetExperiment(RequestContext(), self._context, "", api_pb2.GetExperimentRequest()).run()
        return {info.name for info in found.hparam_infos}, {info.name.tag for info in found.metric_infos}

    def rows_by(self, metric: str) -> list[dict[str, Any]]:
        """Return the rows as the page shows them, sorted by a metric from the greatest."""
        _, metrics = self.columns()
        columns = [api_pb2.ColParams(metric={"tag": tag}) for tag in sorted(metrics)]
        for column in columns:
            if column.metric.tag == metric:
                column.order = api_pb2.ORDER_DESC
        request = api_pb2.ListSessionGroupsRequest(
            col_params=columns, slice_size=100, allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS]
        )
        groups = ListSessionGroups(RequestContext(), self._context, "", request).run().session_groups
        return [
            {
                **{name: value.number_value or value.string_value for name, value in group.hparams.items()},
                **{value.name.tag: value.value for value in group.metric_values},
            }
            for group in groups
        ]


def test_runs_of_a_sweep_are_one_table_that_sorts_by_any_arm(tmp_path: Path) -> None:
    finals = {
        0.3: {"top1/finetune": 92.0, "top1/scratch_b": 91.0},
        0.5: {"top1/finetune": 90.0, "top1/scratch_b": 93.0},
    }
    for ratio, metrics in finals.items():
        write_study(tmp_path / f"ratio{ratio}/tensorboard/hparams", {"pruner": {"ratio": ratio}}, metrics, "")
    table = HParams(tmp_path)
    assert [row["pruner.ratio"] for row in table.rows_by("top1/finetune")] == [0.3, 0.5]
    assert [row["pruner.ratio"] for row in table.rows_by("top1/scratch_b")] == [0.5, 0.3]


def test_the_table_has_the_columns_of_all_runs(tmp_path: Path) -> None:
    write_study(tmp_path / "a", {"pruner": {"ratio": 0.5}, "seed": 0}, {"top1/finetune": 90.0}, "")
    write_study(tmp_path / "b", {"pruner": {"target_macs": 0.4}, "seed": 0}, {"top1/scratch_e": 91.0}, "")
    hparams, metrics = HParams(tmp_path).columns()
    assert hparams == {"pruner.ratio", "pruner.target_macs", "seed"}
    assert metrics == {"top1/finetune", "top1/scratch_e"}


def test_runs_with_equal_hyper_parameters_stay_two_rows(tmp_path: Path) -> None:
    for name, top1 in (("a", 90.0), ("b", 92.0)):
        write_study(tmp_path / name, {"seed": 0}, {"top1/finetune": top1}, "")
    assert [row["top1/finetune"] for row in HParams(tmp_path).rows_by("top1/finetune")] == [92.0, 90.0]


def test_a_study_shows_its_table_and_what_was_chosen(small_study: Run, tmp_path: Path) -> None:
    summary = small_study("arms=[scratch_e]", "recipe.epochs=1", "large.baseline=true")
    hparams, metrics = HParams(tmp_path / "run1").columns()
    assert {"pruner.ratio", "recipe.lr", "recipe.epochs", "model.name", "seed"} <= hparams
    assert not {name for name in hparams if name.startswith("store")}
    (row,) = HParams(tmp_path / "run1").rows_by("top1/scratch_e")
    assert row["pruner.ratio"] == 0.5
    assert row["top1/scratch_e"] == pytest.approx(summary["arms"]["scratch_e"]["top1"])
    assert metrics == {"top1/large", "top1/scratch_e"}
    assert "| scratch_e" in texts(tmp_path / "run1/tensorboard/hparams", "summary")


def test_seeds_become_their_mean_between_the_least_and_the_greatest(tmp_path: Path) -> None:
    write_seed_curves({"l1 0.5": {"finetune": [(80, 90), (84, 93), (85, 96)]}}, tmp_path)
    run = tmp_path / "l1 0.5/finetune"
    assert curve(run, "top1/test") == [(1, 83.0), (2, 93.0)]
    assert curve(run, "seeds/top1_test_mean") == [(1, 83.0), (2, 93.0)]
    assert curve(run, "seeds/top1_test_least") == [(1, 80.0), (2, 90.0)]
    assert curve(run, "seeds/top1_test_greatest") == [(1, 85.0), (2, 96.0)]
    assert re.search(
        r"finetune +\| +3 +\| +2 +\| +93\.00 +\| +90\.00 +\| +96\.00", texts(tmp_path / "l1 0.5", "summary")
    )


def test_an_epoch_counts_when_all_seeds_have_reached_it(tmp_path: Path) -> None:
    write_seed_curves({"g": {"scratch_b": [(80, 90, 95), (84,)], "finetune": [(70, 71), []]}}, tmp_path)
    assert curve(tmp_path / "g/scratch_b", "top1/test") == [(1, 82.0)]
    assert "top1/test" not in events(tmp_path / "g/finetune").Tags()["scalars"]
    assert "finetune" not in texts(tmp_path / "g", "summary")


def test_the_band_is_drawn_from_tags_that_a_run_has_all_or_none_of(tmp_path: Path) -> None:
    """TensorBoard complains about every run that has some of the three, and draws none with other steps."""
    write_seed_curves({"g": {"finetune": [(80, 90), (84, 93)]}}, tmp_path / "report")
    single = ArmEvents(tmp_path / "single", flops_before=0, flops_per_image=1)
    single.write(rows(80, 90))
    single.close()
    aggregate, alone = events(tmp_path / "report/g/finetune"), events(tmp_path / "single")
    layout = Layout.FromString(aggregate.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    series = [s for category in layout.category for chart in category.chart for s in chart.margin.series]
    assert [s.value for s in series] == ["seeds/top1_test_mean"]
    for one in series:
        tags = [one.value, one.lower, one.upper]
        steps = [[point.step for point in aggregate.Scalars(tag)] for tag in tags]
        assert steps == [[1, 2]] * 3
        assert not set(tags) & set(alone.Tags()["scalars"])


def test_writing_aggregates_again_replaces_them(tmp_path: Path) -> None:
    write_seed_curves({"old": {"finetune": [(80,)]}}, tmp_path / "board")
    write_seed_curves({"new": {"finetune": [(81,)]}}, tmp_path / "board")
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["new"]


@pytest.mark.parametrize("label", ["../../outside", "/etc", "a/b", "..", "", "naïve <b>\n"])
def test_labels_are_names_of_folders_inside(label: str, tmp_path: Path) -> None:
    write_seed_curves({label: {"finetune": [(80,)]}, "a?b": {"finetune": [(70,)]}}, tmp_path / "x/y/board")
    runs = {path.parent.relative_to(tmp_path / "x/y/board") for path in (tmp_path).rglob("finetune/events*")}
    assert len(runs) == 2
    assert all(len(run.parts) == 2 for run in runs)


@pytest.mark.parametrize("arm", ["../../../outside", "/etc/outside"])
def test_arms_are_names_of_folders_inside(arm: str, tmp_path: Path) -> None:
    write_seed_curves({"l1": {arm: [(80,)]}}, tmp_path / "x/y/board")
    (events_file,) = (path for path in tmp_path.rglob("events*") if path.parent.name != "l1")
    assert events_file.parent.parent == tmp_path / "x/y/board/l1"


def test_labels_that_fall_together_stay_apart(tmp_path: Path) -> None:
    write_seed_curves({"a/b": {"finetune": [(80,)]}, "a?b": {"finetune": [(70,)]}}, tmp_path)
    finals = [curve(path.parent, "top1/test")[0][1] for path in sorted(tmp_path.rglob("finetune/events*"))]
    assert sorted(value.expected for value in finals) == [70.0, 80.0]


def test_make_board_shows_runs_and_the_reports_means_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "runs/1/tensorboard/hparams", {"seed": 0}, {"top1/finetune": 90.0}, "the table")
    write_seed_curves({"l1": {"finetune": [(80,), (84,)]}}, tmp_path / "report/tensorboard")
    (command,) = re.findall(r"^\t\$\(BIN\)/tensorboard (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--host 127.0.0.1" in command
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *command.split(), "--port", "0", "--reload_interval", "1"])
    url = board.launch()
    expected = ["report/l1", "report/l1/finetune", "runs/1/tensorboard/hparams"]
    found = _wait_for(f"{url}data/runs", lambda content: sorted(content) == expected)
    assert sorted(found) == expected
    layout = _wait_for(f"{url}data/plugin/custom_scalars/layout", bool)
    assert "seeds/top1_test_least" in json.dumps(layout)
    assert "runs/1/tensorboard/hparams" in _wait_for(f"{url}data/plugin/text/tags", lambda tags: len(tags) == 2)


def _wait_for(url: str, done: Callable[[Any], bool]) -> Any:
    """Return what a page of TensorBoard has to say once it has read its files."""
    deadline = time.monotonic() + 30
    content: Mapping[str, Any] | Sequence[Any] = []
    while time.monotonic() < deadline and not done(content):
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError:
            continue
    return content
