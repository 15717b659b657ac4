"""Batches from image files: workers decode, crop and resize to bytes; the device mirrors and normalises.

What is drawn for an image (its crop, whether it is mirrored) belongs to its position in the epoch. So batches depend
neither on the number of workers nor on how many processes share them, and an epoch can be resumed in its middle.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from rethink_prune.data.normalization import Batch, Normalization
from rethink_prune.data.workers import BatchReader, RawBatch, ReadRequest, WorkerPool
from rethink_prune.seeds import derive_generator


class StreamedImages:
    """Images in files: random crops to train on, as is usual for ImageNet, and the centre to evaluate.

    Parameters
    ----------
    reader : BatchReader
        Reads the images, augmented or not.
    normalize : Normalization
        Makes the network's input; also says on which device.
    batch_size : int
        Images in the largest batch.
    workers : int or None
        As for :class:`~rethink_prune.data.workers.WorkerPool`.
    """

    def __init__(self, reader: BatchReader, normalize: Normalization, *, batch_size: int, workers: int | None) -> None:
        self._reader = reader
        self._pool = WorkerPool(reader, batch_size=batch_size, device=normalize.device, workers=workers)
        self._normalize = normalize

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._reader)

    def evaluate(self, parts: Sequence[slice]) -> Iterator[Batch]:
        """Yield a batch for every part; raises as :meth:`~rethink_prune.data.workers.WorkerPool.read` does."""
        requests = ([ReadRequest(i, 0, i) for i in range(part.start, part.stop)] for part in parts)
        for images, labels, _ in self._read(requests):
            yield self._normalize(images), labels

    def train(self, epoch: int, parts: Sequence[torch.Tensor]) -> Iterator[Batch]:
        """Yield a batch for every part of the shuffled and augmented epoch; a part holds positions, int64.

        Raises as :meth:`~rethink_prune.data.workers.WorkerPool.read` does.
        """
        order = torch.randperm(len(self), generator=derive_generator(self._reader.seed, "order", epoch))
        # One batch at a time: an epoch of ImageNet has a million requests.
        requests = (
            [ReadRequest(image, epoch, position) for image, position in torch.stack([order[part], part], 1).tolist()]
            for part in parts
        )
        for images, labels, mirrored in self._read(requests):
            # Mirrored here and not by the workers, which have more to do. Taking whole images costs less than choosing
            # pixel by pixel.
            either = torch.cat([images, images.flip(2)])
            chosen = torch.arange(len(labels), device=labels.device) + len(labels) * mirrored
            yield self._normalize(either.index_select(0, chosen)), labels

    def _read(self, requests: Iterable[list[ReadRequest]]) -> Iterator[RawBatch]:
        for raw in self._pool.read(requests):
            yield RawBatch(*(part.to(self._normalize.device, non_blocking=True) for part in raw))
