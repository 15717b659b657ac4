"""Load a detection set by name."""

from pathlib import Path

from rethink_prune.config import TransferConfig
from rethink_prune.detection.digit_scenes import make_digit_scenes
from rethink_prune.detection.pictures import DetectionData, Pictures
from rethink_prune.detection.voc import read_voc
from rethink_prune.errors import UserError


def load_detection(config: TransferConfig, download_to: Path) -> DetectionData:
    """Return the pictures to train on and to test with. Nothing is decoded yet.

    They are the same for every seed of a study: seeds differ in how networks are trained, not in the data.

    Parameters
    ----------
    config : TransferConfig
        Which set, and its options.
    download_to : Path
        Where VOC 2007 is, or is downloaded to, if ``config.root`` is None.

    Raises
    ------
    UserError
        Its files are not where and as they should be, or one side has nothing to find.

    Examples
    --------
    >>> config = TransferConfig(name="digit_scenes", epochs=1, lr=0.01, scenes=3, test_scenes=2)
    >>> data = load_detection(config, Path("datasets"))
    >>> len(data.train), data.test.classes[0], data.test.picture(1).shape
    (3, '0', torch.Size([3, 96, 96]))
    """
    if config.name == "voc":
        data = DetectionData("voc", *read_voc(config, download_to))
    else:
        data = DetectionData("digit_scenes", *make_digit_scenes(config))
    for side, pictures in (("train on", data.train), ("test with", data.test)):
        if not _has_something_to_find(pictures):
            where = f"transfer.root={config.root}" if config.root else f"transfer.name={config.name}"
            raise UserError(f"{where}: no boxes in the pictures to {side}, or only difficult objects")
    return data


def _has_something_to_find(pictures: Pictures) -> bool:
    return any(not pictures.objects(index).difficult.all() for index in range(len(pictures)))
