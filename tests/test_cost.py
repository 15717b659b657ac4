"""Seconds and memory of forward passes."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from rethink_prune import build_model
from rethink_prune.cost import pass_memory, time_passes


class Sleeper(nn.Module):
    """Takes its time, four times as much after another one, and notes in a shared list that it was called."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        after_another = self.calls and self.calls[-1] != self.name
        self.calls.append(self.name)
        time.sleep(self.seconds * (4 if after_another else 1))
        return images


def test_networks_take_turns_and_every_round_gives_one_number_each() -> None:
    calls: list[str] = []
    slow, fast = Sleeper("slow", 0.16, calls), Sleeper("fast", 0.04, calls)
    times = time_passes({"slow": slow, "fast": fast}, torch.zeros(1), rounds=3)
    assert [len(times["slow"]), len(times["fast"])] == [3, 3]
    assert all(0.16 <= seconds < 0.32 for seconds in times["slow"])
    assert all(
        0.04 <= seconds < slow_seconds for seconds, slow_seconds in zip(times["fast"], times["slow"], strict=True)
    )
    warm_up, turns = calls[:6], calls[6:]
    assert warm_up == ["slow"] * 3 + ["fast"] * 3
    changes = [turns[0], *(b for a, b in pairwise(turns) if a != b)]
    assert changes == ["slow", "fast"] * 3
    # One pass of a turn is not counted; the others take a fifth of a second.
    assert turns.count("slow") <= 3 * (1 + 2)
    assert turns.count("slow") < turns.count("fast") <= 3 * (1 + 5)


def test_the_memory_of_a_pass_is_that_of_the_tensors_alive_together() -> None:
    batch, number = 5, 4  # bytes of a float32
    images = torch.zeros(batch, 4)
    linear, last = nn.Linear(4, 8), nn.Linear(8, 2)
    weights = (4 * 8 + 8 + 8 * 2 + 2) * number
    hidden, logits = batch * 8 * number, batch * 2 * number
    own = weights + images.nbytes
    assert pass_memory(nn.Sequential(linear, nn.ReLU(), last), images) == own + 2 * hidden
    assert pass_memory(nn.Sequential(linear, nn.ReLU(inplace=True), last), images) == own + hidden + logits
    assert pass_memory(nn.Identity(), images) == images.nbytes


def test_shared_weights_count_once_in_memory() -> None:
    images, linear = torch.zeros(1, 4), nn.Linear(4, 4, bias=False)
    twice = pass_memory(nn.Sequential(linear, linear), images)
    assert twice == linear.weight.nbytes + images.nbytes + 2 * images.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_real_network_follows_the_batch_and_the_type_of_its_numbers(dtype: torch.dtype) -> None:
    model = build_model("resnet20").eval().to(dtype)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    stream = 16 * 32 * 32 * dtype.itemsize
    for batch in (1, 8):
        images = torch.zeros(batch, 3, 32, 32, dtype=dtype)
        # At its widest: the first layer's output, a block's input, its first half, and a convolution's and a norm's.
        assert pass_memory(model, images) == weights + images.nbytes + 5 * batch * stream


@pytest.mark.cuda
def test_on_cuda_a_pass_is_timed_until_it_is_done_and_its_memory_is_the_allocators() -> None:
    model = build_model("vgg16").cuda().eval()
    images = torch.zeros(128, 3, 32, 32, device="cuda")
    seconds = time_passes({"vgg16": model}, images, rounds=3)["vgg16"]
    bound = 128 * 313e6 * 2 / 1e15  # no device computes faster than a PFLOP/s in float32
    assert min(seconds) > bound
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert pass_memory(model, images) >= weights + images.nbytes + 2 * 128 * 64 * 32 * 32 * 4
