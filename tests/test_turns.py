"""Works that take turns: one at a time, in order, whatever becomes of the others."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from rethink_prune.errors import Interrupted
from rethink_prune.training.interrupts import Interrupts
from rethink_prune.turns import do_in_turns, number_at_once, pass_turn, turn_given_away


def counting(name: str, seen: list[str], turns: int) -> Callable[[], str]:
    def work() -> str:
        for _ in range(turns):
            seen.append(name)
            pass_turn()
        return name

    return work


def test_turns_go_round_and_a_place_that_is_free_is_taken() -> None:
    seen: list[str] = []
    works = [counting(name, seen, turns) for name, turns in (("a", 1), ("b", 3), ("c", 2))]
    assert do_in_turns(works, at_once=2) == ["a", "b", "c"]
    assert seen == ["a", "b", "c", "b", "c", "b"]


def test_never_two_at_once() -> None:
    running = 0

    def work() -> None:
        nonlocal running
        for _ in range(50):
            running += 1
            time.sleep(1e-5)  # lets other threads run, if any may
            assert running == 1
            running -= 1
            pass_turn()

    assert do_in_turns([work] * 5, at_once=5) == [None] * 5


def test_an_error_ends_one_work_only() -> None:
    seen: list[str] = []

    def failing() -> str:
        pass_turn()
        raise ValueError("broken")

    error, made = do_in_turns([failing, counting("b", seen, 4)], at_once=2)
    assert isinstance(error, ValueError)
    assert (made, seen) == ("b", ["b"] * 4)


def test_who_waits_for_something_outside_does_not_stop_the_others() -> None:
    there = threading.Event()

    def waiting() -> str:
        with turn_given_away():
            assert there.wait(30)
        return "waited"

    assert do_in_turns([waiting, lambda: there.set() or "set"], at_once=2) == ["waited", "set"]


@pytest.mark.parametrize("delay", [0.001, 0.3])
def test_a_signal_ends_all_at_their_next_turn(delay: float) -> None:
    ended: list[str] = []
    began: list[str] = []

    def endless(name: str) -> None:
        began.append(name)
        try:
            while True:
                time.sleep(0.01)
                pass_turn()
        finally:
            ended.append(name)

    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
    with Interrupts(), pytest.raises(Interrupted):  # noqa: PT012 - a signal that comes at any time
        timer.start()
        do_in_turns([lambda: endless("a"), lambda: endless("b")], at_once=2)
    assert sorted(ended) == sorted(began)
    assert number_at_once() == 1


def test_after_one_was_stopped_no_other_begins_and_who_waits_outside_ends() -> None:
    began: list[str] = []
    waiting = threading.Event()

    def stopped() -> None:
        began.append("stopped")
        while not waiting.is_set():
            pass_turn()
        raise Interrupted("saved", signal.SIGTERM)

    def waits() -> None:
        began.append("waits")
        while True:
            with turn_given_away():
                waiting.set()
                time.sleep(0.01)

    outcomes = do_in_turns([stopped, waits, *[lambda: began.append("late")] * 4], at_once=2)
    assert began == ["stopped", "waits"]
    assert all(isinstance(outcome, Interrupted) for outcome in outcomes)
