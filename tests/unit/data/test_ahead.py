"""A thread that works ahead: in order, not too far, with its errors, and gone when nobody wants it."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from cabochon.data.ahead import Ahead


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_results_come_in_order(depth: int) -> None:
    ahead = Ahead(itertools.count().__next__, depth)
    assert [ahead.get() for _ in range(100)] == list(range(100))
    ahead.close()
    ahead.close()


def test_no_more_is_made_than_is_kept() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    ahead = Ahead(make, 3)
    assert until(lambda: len(made) == 4)  # three are kept, and one waits for room
    time.sleep(0.05)
    assert len(made) == 4
    assert ahead.get() == 0
    assert until(lambda: len(made) == 5)
    ahead.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_after_what_was_made_before_it(depth: int) -> None:
    numbers = itertools.count(1)

    def make() -> int:
        if (number := next(numbers)) == 3:
            raise KeyError("gone")
        return number

    ahead = Ahead(make, depth)
    assert [ahead.get(), ahead.get()] == [1, 2]
    for _ in range(2):
        with pytest.raises(KeyError, match="gone"):
            ahead.get()
    ahead.close()


def test_the_thread_ends_when_it_is_closed_or_forgotten() -> None:
    before = threading.active_count()
    closed, forgotten = (Ahead(itertools.count().__next__, 2) for _ in range(2))
    assert threading.active_count() == before + 2
    closed.close()
    del forgotten
    gc.collect()
    assert until(lambda: threading.active_count() == before)


def test_a_process_ends_while_its_thread_waits() -> None:
    code = "import threading; from cabochon.data.ahead import Ahead; kept = Ahead(threading.Event().wait, 2)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
