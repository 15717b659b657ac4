"""A study in Python: composed from overrides as the command line composes it."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rethink_prune.errors import UserError
from rethink_prune.files import conf_dir
from rethink_prune.study.compose_errors import composition_error
from rethink_prune.study.prepare import check_config, prepare_study


class Study:
    """A study, composed and validated as ``python -m rethink_prune`` does it.

    :func:`~rethink_prune.study.run.run_study` runs it.

    Parameters
    ----------
    overrides : mapping of str to object, optional
        What differs from the default study, as on the command line: choices of groups, such as ``{"model": "vgg16"}``,
        and values of keys, such as ``{"pruner.ratio": 0.3}`` or ``{"recipe": {"epochs": 2}}``. A key that is in no file
        takes a ``+`` in front.

    Attributes
    ----------
    config : StudyConfig
        The whole configuration.
    experiment : str or None
        The choice of the group ``experiment``.

    Raises
    ------
    UserError
        If there is no such group, choice or key, or a value makes no sense.

    Examples
    --------
    >>> study = Study({"model": "vgg11", "pruner.ratio": 0.3, "arms": ["finetune"]})
    >>> study.config.model.name, study.config.pruner.ratio, study.config.arms
    ('vgg11', 0.3, ('finetune',))
    """

    def __init__(self, overrides: Mapping[str, Any] | None = None) -> None:
        if not isinstance(overrides, Mapping | None):
            raise UserError(f"Study: takes a mapping, such as {{'pruner.ratio': 0.3}}, and not {overrides!r}")
        plain, self.experiment = compose_shipped([f"{key}={override_text(v)}" for key, v in (overrides or {}).items()])
        self.config = check_config(plain)

    def plan(self) -> dict[str, Any]:
        """Return the content of ``plan.json``: the networks, and what every arm will train; nothing is trained.

        Raises
        ------
        UserError
            If the parts of the study do not fit each other, the images or this machine.

        Examples
        --------
        >>> plan = Study({"device": "cpu"}).plan()
        >>> {name: arm["epochs"] for name, arm in plan["arms"].items()}
        {'finetune': 3, 'scratch_e': 12, 'scratch_b': 23}
        """
        _, _, content = prepare_study(self.config).full_plan()
        return content


def compose_shipped(arguments: Sequence[str] = ()) -> tuple[dict[str, Any], str | None]:
    """Compose the shipped configuration with overrides; return it as plain values, and the choice of ``experiment``.

    Raises
    ------
    UserError
        If there is no such group, choice or key.

    Examples
    --------
    >>> plain, experiment = compose_shipped(["model=vgg11"])
    >>> plain["model"]["name"], experiment
    ('vgg11', None)
    """
    # A program with a Hydra of its own, or a job of one, keeps it: it is put back at the end.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            tree = compose("config", overrides=list(arguments), return_hydra_config=True)
        experiment = tree.hydra.runtime.choices.get("experiment")
        tree = OmegaConf.masked_copy(tree, [str(name) for name in tree if name != "hydra"])
        return cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True)), experiment
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise composition_error(error, arguments) from error
    finally:
        GlobalHydra.instance().hydra = outer


def override_text(value: Any) -> str:
    r"""Return a value as Hydra's overrides have it on a command line; text in quotes.

    Examples
    --------
    >>> override_text([0.5, None, True, 'my "photos"'])
    '[0.5,null,true,"my \\"photos\\""]'
    >>> override_text({"layer1.*": 0.2})
    '{layer1.*:0.2}'
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Real():
            return str(value)
        case Mapping():
            return f"{{{','.join(f'{key}:{override_text(item)}' for key, item in value.items())}}}"
        case list() | tuple():
            return f"[{','.join(map(override_text, value))}]"
        case _:  # text, and paths
            return QuotedString(str(value), Quote.double).with_quotes()
