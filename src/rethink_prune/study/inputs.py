"""The images of a study: counted before anything is trained, read when they are first needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from rethink_prune.config import DatasetConfig, RecipeConfig
from rethink_prune.data import (
    AnyEvalBatches,
    AnyTrainBatches,
    ImageDataset,
)
from rethink_prune.study.tmpdata import describe_dataset, eval_batches, load_dataset, train_batches
from rethink_prune.training.distributed import Processes
from rethink_prune.training.runtime import Runtime


class Inputs:
    """The images a study trains and is judged on.

    Parameters
    ----------
    options : DatasetConfig
        Which images.
    recipe : RecipeConfig
        Has the batch sizes, and whether images are augmented.
    seed : int
        Decides order and augmentation.
    runtime : Runtime
    processes : Processes
        Those that train together; on one machine they read the images one after the other.
    cache_dir : Path
        Where decoded images are kept.

    Attributes
    ----------
    info : DatasetInfo
        What is known without decoding an image.
    image_shape : tuple of int
        C x H x W.

    Raises
    ------
    UserError
        If the options do not fit the data set, or its files are not as they should be.
    """

    def __init__(
        self,
        options: DatasetConfig,
        recipe: RecipeConfig,
        *,
        seed: int,
        runtime: Runtime,
        processes: Processes,
        cache_dir: Path,
    ) -> None:
        self.info = describe_dataset(options)
        self.image_shape = (self.info.channels, self.info.image_size, self.info.image_size)
        self._options = options
        self._recipe = recipe
        self._seed = seed
        self._runtime = runtime
        self._processes = processes
        self._cache_dir = cache_dir

    @cached_property
    def dataset(self) -> ImageDataset:
        """The images."""

        def load() -> ImageDataset:
            return load_dataset(self._options, cache_dir=self._cache_dir, progress=self._runtime.show_progress)

        # The first process of a machine fills the cache that the others then read.
        return self._processes.one_after_another(load)

    @cached_property
    def train_batches(self) -> AnyTrainBatches:
        """The training images, augmented as the recipe says."""
        return train_batches(
            self.dataset,
            self._options,
            batch_size=self._recipe.batch_size,
            augment=self._recipe.augment,
            device=self._runtime.device,
            seed=self._seed,
        )

    @cached_property
    def evaluations(self) -> dict[str, AnyEvalBatches]:
        """The images that networks are judged by: test, and validation if some are held out."""
        splits = {"test": self.dataset.test, "validation": self.dataset.validation}
        return {
            name: eval_batches(
                self.dataset,
                images,
                batch_size=self._recipe.eval_batch_size,
                device=self._runtime.device,
                workers=self._options.workers,
            )
            for name, images in splits.items()
            if images is not None
        }
