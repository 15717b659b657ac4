"""Detection, a second task for the networks of a study: pictures with boxes, and the measure.

To read first: :mod:`~rethink_prune.detection.pictures` (what a detection set is),
:mod:`~rethink_prune.detection.load` (load one by name) and :mod:`~rethink_prune.detection.average_precision` (what is
reported).
"""

from rethink_prune.detection.average_precision import coco_map, voc_map
from rethink_prune.detection.load import load_detection
from rethink_prune.detection.pictures import DetectionData, Objects, Pictures

__all__ = ["DetectionData", "Objects", "Pictures", "coco_map", "load_detection", "voc_map"]
