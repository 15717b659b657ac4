"""Images, in memory as bytes or in files, and the batches drawn from them.

To read first: :mod:`~rethink_prune.data.dataset` (load a data set by name), :mod:`~rethink_prune.data.batches` (turn it
into batches) and :mod:`~rethink_prune.data.sources` (the data sets there are; how to add one).
"""

from rethink_prune.data.batches import Epoch, EvalBatches, TrainBatches, eval_batches, train_batches
from rethink_prune.data.dataset import DatasetInfo, ImageDataset, describe_dataset, load_dataset
from rethink_prune.data.source import ImageArray, ImageFiles

__all__ = [
    "DatasetInfo",
    "Epoch",
    "EvalBatches",
    "ImageArray",
    "ImageDataset",
    "ImageFiles",
    "TrainBatches",
    "describe_dataset",
    "eval_batches",
    "load_dataset",
    "train_batches",
]
