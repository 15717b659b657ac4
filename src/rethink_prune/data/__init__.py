"""Images, in memory as bytes or in files, and the batches drawn from them."""

from rethink_prune.data.batches import Epoch, EvalBatches, TrainBatches
from rethink_prune.data.contract import AnyEvalBatches, AnyTrainBatches
from rethink_prune.data.dataset import DatasetInfo, ImageDataset, describe_dataset, load_dataset
from rethink_prune.data.evaluation import eval_batches
from rethink_prune.data.split import Files, Split
from rethink_prune.data.streaming import StreamBatches, StreamEvalBatches

__all__ = [
    "AnyEvalBatches",
    "AnyTrainBatches",
    "DatasetInfo",
    "Epoch",
    "EvalBatches",
    "Files",
    "ImageDataset",
    "Split",
    "StreamBatches",
    "StreamEvalBatches",
    "TrainBatches",
    "describe_dataset",
    "eval_batches",
    "load_dataset",
]
