"""Threads of one process that take turns: one of them runs at a time, and passes the turn on where it likes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rethink_prune.errors import Interrupted

Made = TypeVar("Made")


class _Turn:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = True  # by the thread that starts the others
        # What ended the wait of that thread: the others end at their next turn.
        self.stopped: Interrupted | None = None

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

    def check(self) -> None:
        """End this thread's work if all work is to end."""
        if self.stopped is not None:
            raise Interrupted(str(self.stopped), self.stopped.signum)

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
        turn.check()


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
    turn.check()


def do_in_turns(works: Sequence[Callable[[], Made]], *, at_once: int) -> list[Made | BaseException]:
    """Do all works in threads that take turns; return what each has made, or the error with which it ended.

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

    def work_off(mine: threading.Event) -> None:
        mine.wait()
        _of_thread.turn = turn
        while left:
            number, work = left.popleft()
            try:
                outcomes[number] = work()
            except BaseException as error:
                outcomes[number] = error
        turn.give()

    # Queued here, so that the order is that of the works.
    places = [turn.queue() for _ in range(at_once)]
    # Daemons: after a second signal, the process ends without them.
    threads = [threading.Thread(target=work_off, args=(mine,), daemon=True) for mine in places]
    for thread in threads:
        thread.start()
    turn.give()
    try:
        _join(threads)
    except Interrupted as stop:
        turn.stopped = stop
        _join(threads)
        raise
    return [outcomes[number] for number in range(len(works))]


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        # A signal that the system gives to another thread does not end a wait, and its handler runs after it.
        while thread.is_alive():
            thread.join(timeout=0.2)
