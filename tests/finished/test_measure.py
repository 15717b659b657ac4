"""What the cost of a network is measured with on CUDA: recorded passes, and the batch that fills the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import FakeRecorder
from rethink_prune.finished import measure
from rethink_prune.finished.measure import cost_table, full_batch, measure_stage, time_networks, usable_recorder
from rethink_prune.store.stage import Stage

Run = Callable[..., dict[str, Any]]


class Counting(nn.Module):
    """Counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return x + 1


def test_what_is_timed_is_the_replay() -> None:
    models, recorder = {"large": Counting(), "pruned": Counting()}, FakeRecorder()
    times = time_networks(models, torch.zeros(2, 3), recorder, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"large": 3, "pruned": 3}
    assert (recorder.warmed, recorder.recorded) == (6, 2)
    # Of this stand-in, a replay is a pass.
    assert recorder.replayed == sum(model.passes for model in models.values()) - recorder.warmed > 0


def test_one_network_that_cannot_be_recorded_leaves_both_plain(caplog: pytest.LogCaptureFixture) -> None:
    broken = FakeRecorder(fails="operation not permitted\nwhen stream is capturing")
    assert usable_recorder(broken, {"large": Counting()}, torch.zeros(1)) is None
    assert [record.getMessage() for record in caplog.records] == [
        "accelerate: no CUDA graph of the passes, because operation not permitted; kernels are launched one by one"
    ]
    whole = FakeRecorder()
    assert usable_recorder(whole, {"large": Counting()}, torch.zeros(1)) is whole


def device(seconds: Callable[[int], Sequence[float]], *, memory: int = 1 << 30) -> Callable[[int], Sequence[float]]:
    """Return the images/s of a device on which a batch takes so many seconds."""

    def rates(batch_size: int) -> Sequence[float]:
        if batch_size > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [batch_size / value for value in seconds(batch_size)]

    return rates


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        # Launches take a millisecond, and from 1,000 images on the pass takes longer.
        (device(lambda batch: [max(1.0, batch / 1000)]), 1024),
        (device(lambda batch: [max(1.0, batch / 1000), max(1.0, batch / 4000)]), 4096),
        (device(lambda batch: [batch / 1000]), 128),
        (device(lambda batch: [1.0], memory=600), 512),
    ],
    ids=["full", "the slower to fill decides", "full from the start", "memory ends"],
)
def test_a_batch_is_doubled_until_the_device_is_full(rates: Callable[[int], Sequence[float]], expected: int) -> None:
    assert full_batch(rates, 128) == expected


def test_a_first_batch_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        full_batch(device(lambda batch: [1.0], memory=64), 128)


def test_a_gpu_is_measured_recorded_and_full(small_study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a stand-in for its recorder and for its clock."""
    folder = Path(small_study("arms=[finetune]")["arms"]["finetune"]["stage"])
    cpu, recorder = torch.device("cpu"), FakeRecorder()

    class Gpu:
        type = "cuda"

    def time_passes(models: Mapping[str, Any], images: torch.Tensor, *, rounds: int) -> dict[str, list[float]]:
        for forward in models.values():
            forward(images)
        # Large is full at 256 images, pruned at 512.
        per_image = {"large": 1 / 256, "pruned": 1 / 512}
        return {name: [max(1.0, len(images) * per_image[name])] * rounds for name in models}

    real = torch.randn
    monkeypatch.setattr(measure, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(measure, "time_passes", time_passes)
    monkeypatch.setattr(measure, "describe_device", lambda device: "a GPU")
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: real(*shape, dtype=dtype))
    monkeypatch.setattr(nn.Module, "to", lambda self, *arguments, **options: self)
    content = measure_stage(Stage(folder), Gpu(), "fp32", rounds=2)  # type: ignore[arg-type]
    assert (content["recorded"], content["full_batch"]) == (True, 512)
    assert list(content["networks"]["large"]["batches"]) == ["1", "128", "512"]
    assert {batch: spread["median"] for batch, spread in content["speedup"].items()} == {"1": 1, "128": 1, "512": 2}
    assert recorder.replayed > 0
    table = cost_table(content)
    assert "Passes are recorded as CUDA graphs and replayed." in table
    assert "Batch 512 fills the device: twice the images give no more than 5 % more images/s" in table
    monkeypatch.undo()
    on_cpu = measure_stage(Stage(folder), cpu, "fp32", rounds=1)
    assert (on_cpu["recorded"], on_cpu["full_batch"]) == (False, None)
    assert list(on_cpu["networks"]["large"]["batches"]) == ["1", "128"]
    # What an earlier version wrote can be shown.
    del on_cpu["recorded"], on_cpu["full_batch"]
    assert "CUDA graphs" not in cost_table(on_cpu)


@pytest.mark.cuda
def test_a_gpu_is_faster_at_the_batch_that_fills_it(small_study: Run) -> None:
    folder = Path(small_study("arms=[finetune]")["arms"]["finetune"]["stage"])
    content = measure_stage(Stage(folder), torch.device("cuda"), "fp32", rounds=3)
    assert content["recorded"]
    for network in content["networks"].values():
        rates = {batch: found["images_per_second"]["median"] for batch, found in network["batches"].items()}
        assert rates["1"] < rates[str(content["full_batch"])]
