"""The documented place of `Architecture` and `reshape`, which are in `rethink_prune.surgery` now."""

from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape

__all__ = ["Architecture", "reshape"]
