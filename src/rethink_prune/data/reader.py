"""Read whole batches of image files: what a worker process does."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, get_worker_info

from rethink_prune.data.crops import CROP_DRAWS, place_crop
from rethink_prune.data.decoding import describe_failure, jpeg_decoder, read_centre, read_crop
from rethink_prune.data.images import ImageFiles
from rethink_prune.data.memory import MORE_SHARED_MEMORY
from rethink_prune.errors import UserError
from rethink_prune.seeds import derive_generator


class ReadRequest(NamedTuple):
    """Which image, and where in training it comes: what its random draws depend on."""

    image: int
    epoch: int
    position: int


class RawBatch(NamedTuple):
    """What a worker makes: uint8 B x H x W x C, int64 B, and bool B, whether to mirror."""

    images: torch.Tensor
    labels: torch.Tensor
    mirrored: torch.Tensor


@dataclass(frozen=True)
class BatchReader(Dataset[RawBatch | UserError]):
    """Decodes, crops and resizes the images of a batch.

    Attributes
    ----------
    files : ImageFiles
        All images.
    image_size : int
        Height and width of the result, in pixels.
    seed : int
        The study's seed.
    augment : bool
        Take random parts instead of the centre.
    flip : bool
        Mirror half of the images.
    """

    files: ImageFiles
    image_size: int
    seed: int = 0
    augment: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        jpeg_decoder()  # imported once here, not by every worker

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, requests: Sequence[ReadRequest]) -> RawBatch | UserError:
        """Return one batch, or why there is none."""
        # Errors are returned: those that are raised in a worker come with its traceback.
        count, size = len(requests), self.image_size
        batch = RawBatch(
            images=torch.empty(count, size, size, 3, dtype=torch.uint8),
            labels=self.files.labels[[request.image for request in requests]],
            mirrored=torch.zeros(count, dtype=torch.bool),
        )
        if get_worker_info() is not None:
            try:
                # Sending would do this as well, but in a thread: nobody would notice a failure there, and the training
                # would wait for ever.
                for tensor in batch:
                    tensor.share_memory_()
            except RuntimeError as error:
                return UserError(f"dataset.workers: {error}; {MORE_SHARED_MEMORY}")
        for row, request in enumerate(requests):
            name = self.files.name(request.image)
            try:
                batch.images[row], batch.mirrored[row] = self._read(self.files.root / name, request)
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                return UserError(
                    f"dataset.root={self.files.root}: {name} cannot be read ({describe_failure(error)}); nothing "
                    "finished is lost: put an intact file there and run the same command again"
                )
        return batch

    def _read(self, path: Path, request: ReadRequest) -> tuple[torch.Tensor, bool]:
        # The draws belong to the position in the epoch: neither the number of workers nor that of processes matters.
        generator = derive_generator(self.seed, "augmentation", request.epoch, request.position)
        mirror, *draws = torch.rand(1 + CROP_DRAWS, generator=generator, dtype=torch.float64).tolist()
        if self.augment:
            pixels = read_crop(path, self.image_size, partial(place_crop, draws=draws))
        else:
            pixels = read_centre(path, self.image_size)
        return pixels, self.flip and mirror < 0.5
