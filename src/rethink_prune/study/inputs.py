"""The images of a study: counted before anything is trained, read when they are first needed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from rethink_prune.config import DatasetConfig, RecipeConfig
from rethink_prune.data.batches import Batch, EvalBatches, TrainBatches, eval_batches, train_batches
from rethink_prune.data.dataset import DatasetInfo, ImageDataset, describe_dataset, load_dataset
from rethink_prune.training.distributed import Processes
from rethink_prune.training.runtime import Runtime

# Images: as many as CIFAR has.
_MOST_FOR_STATISTICS = 50_000


@dataclass(frozen=True)
class Inputs:
    """The images a study trains and is judged on.

    Attributes
    ----------
    recipe : RecipeConfig
        Has the batch sizes, and how images are augmented and mixed.
    seed : int
        Decides order and augmentation.
    cache_dir : Path
        Where decoded images are kept.
    """

    options: DatasetConfig
    recipe: RecipeConfig
    seed: int
    runtime: Runtime
    processes: Processes
    cache_dir: Path

    @cached_property
    def info(self) -> DatasetInfo:
        """What is known without decoding an image; raises `UserError` if the files are not as they should be."""
        return describe_dataset(self.options)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C x H x W."""
        return (self.info.channels, self.info.image_size, self.info.image_size)

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images."""

        def load() -> ImageDataset:
            return load_dataset(self.options, cache_dir=self.cache_dir, progress=self.runtime.show_progress)

        # The first process of a machine fills the cache that the others then read.
        return self.processes.one_after_another(load)

    @cached_property
    def train_batches(self) -> TrainBatches:
        """The training images, augmented and mixed as the recipe says."""
        recipe = self.recipe
        return train_batches(
            self.dataset,
            self.options,
            batch_size=recipe.batch_size,
            augment=recipe.augment,
            device=self.runtime.device,
            seed=self.seed,
            rand_augment=recipe.rand_augment,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )

    def recalibration(self) -> Iterator[Batch]:
        """Yield shuffled training batches, not augmented, for batch norms; the same for every pruner."""
        size, device = self.recipe.batch_size, self.runtime.device
        batches = train_batches(
            self.dataset, self.options, batch_size=size, augment=False, device=device, seed=self.seed
        )
        return islice(batches.epoch(0), math.ceil(_MOST_FOR_STATISTICS / size))

    @cached_property
    def evaluations(self) -> dict[str, EvalBatches]:
        """The images that networks are judged by: test, and validation if some are held out."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        size, device, workers = self.recipe.eval_batch_size, self.runtime.device, self.options.workers
        return {
            name: eval_batches(self.dataset, images, batch_size=size, device=device, workers=workers)
            for name, images in splits.items()
            if images is not None
        }
