"""What TensorBoard shows: read back from its event files, and through its own back ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

from rethink_prune.tracking.tensorboard import ArmEvents, write_study

Run = Callable[..., dict[str, Any]]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def texts(folder: Path, tag: str) -> str:
    (event,) = events(folder).Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


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


def test_a_detectors_rows_are_curves_by_epoch_and_by_flops(tmp_path: Path) -> None:
    written = ArmEvents(tmp_path / "detect_prune_c", flops_before=5e12, flops_per_image=1e10)
    row = {"lr": 0.001, "images": 100, "train_loss": 0.5, "processes": 1, "seconds": 1.0}
    written.write([{"epoch": 1, **row, "test_map": 60.0}, {"epoch": 2, **row, "test_map": 70.0}])
    written.close()
    found = events(tmp_path / "detect_prune_c")
    curves = {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert curves.keys() == {
        *("average precision mAP by epoch/test", "average precision mAP by training GFLOPs/test"),
        *("loss by epoch/train", "loss by training GFLOPs/train", "lr"),
    }
    assert curves["average precision mAP by epoch/test"] == [(1, 60.0), (2, 70.0)]
    assert curves["average precision mAP by training GFLOPs/test"] == [(6000, 60.0), (7000, 70.0)]
