"""Signals that end a run: the first is noted, so that the run can save and leave; the second has its usual effect."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Inside the block, the function it gives says which signal has come; 0: none. Only the main thread hears any."""
    came = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
