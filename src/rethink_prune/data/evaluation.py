"""The batches that networks are judged by, wherever their images are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rethink_prune.data.batches import EvalBatches
from rethink_prune.data.contract import AnyEvalBatches
from rethink_prune.data.split import Files, Split
from rethink_prune.data.streaming import StreamEvalBatches


def eval_batches(
    images: Split | Files,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int | None = None,
) -> AnyEvalBatches:
    """Return every image once, in order: from memory, or from files by `workers` processes.

    Parameters are those of :class:`~rethink_prune.data.batches.EvalBatches` and
    :class:`~rethink_prune.data.streaming.StreamEvalBatches`.
    """
    if isinstance(images, Files):
        return StreamEvalBatches(
            images,
            mean=mean,
            std=std,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            workers=workers,
        )
    return EvalBatches(images, mean=mean, std=std, batch_size=batch_size, device=device)
