"""What is trained and evaluated of a network's output."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from rethink_prune.outputs import main_output, output_loss, unused_outputs

LOGITS, FIRST, SECOND = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
LABELS = torch.tensor([0, 2, 1, 1])
Named = namedtuple("Named", ["features", "logits"])


def loss(logits: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(logits, LABELS, label_smoothing=smoothing)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, FIRST),
        [LOGITS, None],
        {"features": FIRST, "logits": LOGITS},
        {"out": LOGITS, "aux": FIRST},
        {"scores": LOGITS, "features": FIRST},
        Named(features=FIRST, logits=LOGITS),
    ],
)
def test_the_logits_alone_are_trained(output: Any) -> None:
    assert main_output(output) is LOGITS
    assert torch.equal(output_loss(output, LABELS), loss(LOGITS))
    assert unused_outputs(output) == (output is not LOGITS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_auxiliary_heads_of_torchvision_count_as_documented(smoothing: float) -> None:
    google = GoogLeNetOutputs(LOGITS, FIRST, SECOND)
    expected = loss(LOGITS, smoothing) + 0.3 * loss(FIRST, smoothing) + 0.3 * loss(SECOND, smoothing)
    torch.testing.assert_close(output_loss(google, LABELS, label_smoothing=smoothing), expected)
    inception = InceptionOutputs(LOGITS, FIRST)
    expected = loss(LOGITS, smoothing) + 0.4 * loss(FIRST, smoothing)
    torch.testing.assert_close(output_loss(inception, LABELS, label_smoothing=smoothing), expected)
    assert main_output(google) is main_output(inception) is LOGITS
    assert not unused_outputs(google)


def test_heads_that_are_switched_off_do_not_count() -> None:
    assert torch.equal(output_loss(GoogLeNetOutputs(LOGITS, None, None), LABELS), loss(LOGITS))


def test_whatever_has_no_logits_is_left_for_the_check_to_refuse() -> None:
    assert main_output("text") == "text"
    assert main_output(()) == ()
