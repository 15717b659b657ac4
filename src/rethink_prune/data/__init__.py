"""Image sets held in memory as bytes, and the batches drawn from them."""

from rethink_prune.data.batches import Epoch, EvalBatches, TrainBatches
from rethink_prune.data.dataset import DatasetInfo, ImageDataset, Split, describe_dataset, load_dataset

__all__ = [
    "DatasetInfo",
    "Epoch",
    "EvalBatches",
    "ImageDataset",
    "Split",
    "TrainBatches",
    "describe_dataset",
    "load_dataset",
]
