"""Stop at a signal, after saving what is done, so that the work can go on later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rethink_prune.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns `signals` into :class:`~rethink_prune.errors.Interrupted`.

    Use as a context manager. Inside :meth:`deferred` a signal only sets `requested`; the body has to look at it, save
    and call :meth:`stop`. A second signal raises at once.

    Examples
    --------
    >>> with Interrupts() as interrupts:
    ...     with interrupts.deferred():
    ...         signal.raise_signal(signal.SIGTERM)
    ...         interrupts.requested == signal.SIGTERM
    True
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.signals = signals
        self.requested: int | None = None
        self._deferring = 0  # pieces of work that save and stop by themselves
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        # Python lets the main thread alone set handlers; a study in another thread cannot be stopped by signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Set `requested` at a signal, instead of raising, while the body runs."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1

    def stop(self, where: str) -> None:
        """Raise `Interrupted` for the signal in `requested`; `where` says in which piece of work."""
        assert self.requested is not None
        name = signal.Signals(self.requested).name
        raise Interrupted(f"{name} {where}: saved; run the same command again to go on", self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and self.requested is None:
            self.requested = number
            return
        raise Interrupted(f"{signal.Signals(number).name}: run the same command again to go on", number)
