"""Threads of one process that take turns: one of them runs at a time, and passes the turn on where it likes."""

from __future__ import annotations

import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

from rethink_prune.errors import Interrupted

Made = TypeVar("Made")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class _Turn:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = True  # by the thread that starts the others
        # What ended the wait of that thread: the others end at their next turn.
        self.stopped: Interrupted | None = None
        # What ended one of the works: those that wait for something outside end as well; the others save first.
        self.stopping: Interrupted | None = None

    def queue(self) -> threading.Event:
        """Ask for the turn; it is there when the event is set."""
        mine = threading.Event()
        with self._guard:
            self._waiting.append(mine)
            self._call_next()
        return mine

    def give(self) -> None:
        """Let the next one have it."""
        with self._guard:
            self._taken = False
            self._call_next()

    def pass_on(self) -> None:
        """Wait until everybody who waits has had it."""
        if self._waiting:
            mine = self.queue()
            self.give()
            mine.wait()

    def _call_next(self) -> None:
        if not self._taken and self._waiting:
            self._taken = True
            self._waiting.popleft().set()


_of_thread = threading.local()


def _turn_of_thread() -> _Turn | None:
    return getattr(_of_thread, "turn", None)


def number_at_once() -> int:
    """Return how many threads take turns with this one, itself included; 1 for one that does not.

    Examples
    --------
    >>> number_at_once(), do_in_turns([number_at_once, number_at_once], at_once=2)
    (1, [2, 2])
    """
    turn = _turn_of_thread()
    return turn.threads if turn is not None else 1


def pass_turn() -> None:
    """Let the others go on until they pass the turn, too; without any, go on at once.

    Raises
    ------
    Interrupted
        If a signal has ended all work.

    Examples
    --------
    >>> pass_turn()
    """
    turn = _turn_of_thread()
    if turn is not None:
        turn.pass_on()
        _end(turn.stopped)


@contextmanager
def turn_given_away() -> Iterator[None]:
    """Let the others go on while the body waits for something outside of them.

    Raises
    ------
    Interrupted
        If a signal has ended all work.

    Examples
    --------
    >>> with turn_given_away():
    ...     pass
    """
    turn = _turn_of_thread()
    if turn is None:
        yield
        return
    turn.give()
    try:
        yield
    finally:
        turn.queue().wait()
    _end(turn.stopped or turn.stopping)


def _end(signal_of_all: Interrupted | None) -> None:
    if signal_of_all is not None:
        raise Interrupted(str(signal_of_all), signal_of_all.signum)


def do_in_turns(works: Sequence[Callable[[], Made]], *, at_once: int) -> list[Made | BaseException]:
    """Do all works in threads that take turns; return what each has made, or the error with which it ended.

    After one has ended with `Interrupted`, no other is begun.

    Parameters
    ----------
    works : sequence of callable
        Each calls `pass_turn` where others may go on.
    at_once : int
        Threads. The works begin in their order.

    Raises
    ------
    Interrupted
        If a signal's handler raises it; all works have ended at their next turn.

    Examples
    --------
    >>> seen = []
    >>> def count(name):
    ...     for number in range(2):
    ...         seen.append((name, number))
    ...         pass_turn()
    ...     return name
    >>> do_in_turns([lambda: count("a"), lambda: count("b")], at_once=2)
    ['a', 'b']
    >>> seen
    [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    """
    at_once = min(at_once, len(works))
    turn = _Turn(at_once)
    outcomes: dict[int, Made | BaseException] = {}
    left = deque(enumerate(works))

    def work_off(mine: threading.Event, ended: threading.Event) -> None:
        mine.wait()
        _of_thread.turn = turn
        while left and turn.stopped is None:
            number, work = left.popleft()
            try:
                outcomes[number] = work()
            except BaseException as error:
                outcomes[number] = error
                # They hold what the work has made, such as a network on a device.
                traceback.clear_frames(error.__traceback__)
                if isinstance(error, Interrupted):
                    turn.stopping = error
                    outcomes.update((number, error) for number, _ in left)
                    left.clear()
        turn.give()
        ended.set()

    # Queued here, so that the order is that of the works.
    places = [turn.queue() for _ in range(at_once)]
    # Daemons: after a second signal, the process ends without them.
    ended = [threading.Event() for _ in places]
    threads = [
        threading.Thread(target=copy_context().run, args=(work_off, *events), daemon=True)
        for events in zip(places, ended, strict=True)
    ]
    started = False
    try:
        with _signals_held_back():
            for thread in threads:
                thread.start()
            turn.give()
            started = True
        _wait_for(ended)
    except Interrupted as stop:
        turn.stopped = stop
        if started:
            _wait_for(ended)
        raise
    return [outcomes[number] for number in range(len(works))]


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let the handlers of signals run after the body: a thread must not be left half started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for came_first in came:
        signal.raise_signal(came_first)


def _wait_for(events: Sequence[threading.Event]) -> None:
    # Not Thread.join: a wait that a handler's error ends marks its thread as ended (Python 3.11, bpo-45274).
    for event in events:
        # A signal that the system gives to another thread does not end a wait, and its handler runs after it.
        while not event.wait(timeout=0.2):
            pass
