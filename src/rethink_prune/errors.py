"""The two ways a study ends early for a reason the user can act on."""

from __future__ import annotations

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """Something the user can put right: printed as its message alone, without a traceback, exit status 1."""


class Interrupted(KeyboardInterrupt):
    """A signal that was honoured, such as SIGINT or SIGTERM: the step was finished and saved.

    A ``KeyboardInterrupt``, so that it also ends a multirun instead of counting as one failed job.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def overtaken(self) -> UserError | None:
        """The error that was on its way to the user when the signal came; then it is the reason for the end."""
        error = self.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        return error

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        # Launchers send what ends a job from process to process.
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
