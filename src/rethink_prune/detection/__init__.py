"""Detection, a second task for the networks of a study: pictures with boxes, and the measure.

To read first: :mod:`~rethink_prune.detection.pictures` (what a detection set is and how to load one) and
:mod:`~rethink_prune.detection.average_precision` (what is reported).
"""

from rethink_prune.detection.average_precision import coco_map, voc_map

__all__ = ["coco_map", "voc_map"]
