"""The ways in which a study ends early: an error that the user can correct, and a signal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """An error that the user can correct: Hydra prints its message alone, without a traceback; exit status 1.

    Examples
    --------
    >>> raise UserError("pruner.ratio=1.2: must be in (0, 1)")
    Traceback (most recent call last):
    rethink_prune.errors.UserError: pruner.ratio=1.2: must be in (0, 1)
    """


class Refused(BaseException):
    """Carries a `UserError` out of a job that Hydra runs; of an ``Exception``, Hydra would print things of its own.

    Attributes
    ----------
    error : UserError
    """

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error


class Interrupted(KeyboardInterrupt):
    """A signal, such as SIGINT or SIGTERM, after which the step was finished and saved.

    A ``KeyboardInterrupt``, so that it also ends a multirun instead of counting as one failed job.

    Parameters
    ----------
    message : str
        For the user.
    signum : int
        The signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def overtaken(self) -> UserError | None:
        """The user's error that was being raised when the signal came: it, not the signal, is why the study ends."""
        error = self.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        return error

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        # Launchers send exceptions between processes; the default would call the class without `signum`.
        return type(self), (str(self), self.signum)


def first_line(error: Exception) -> str:
    r"""Return the first line of an error's message that is not blank; without a message, its class.

    Examples
    --------
    >>> first_line(RuntimeError("\nout of memory\nand a long explanation"))
    'out of memory'
    >>> first_line(ValueError())
    'ValueError'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what someone who typed `name` may have meant: the most similar of the known names; all if none is similar.

    Examples
    --------
    >>> suggestion("resnet65", ["resnet20", "resnet56", "vgg16"])
    'did you mean resnet56 or resnet20?'
    >>> suggestion("mlp", ["resnet20", "vgg16"])
    'known are resnet20, vgg16'
    """
    names = list(known)
    return nearest(name, names) or f"known are {', '.join(names)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the most similar of the known names as a question; nothing if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?" if near else ""
