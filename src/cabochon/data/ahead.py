"""Work that a thread does ahead of whoever needs it."""

import collections
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `make` over and over on a thread of its own and keeps up to `depth` results; 0: calls it when asked.

    The thread ends with `close`, with the last reference to this object, and with the process.
    """

    def __init__(self, make: Callable[[], T], depth: int) -> None:
        self._make, self._shared = make, _Shared[T](depth)
        self._thread: threading.Thread | None = None
        if depth:
            # The thread knows nothing of `self`, or that would never be let go.
            self._thread = threading.Thread(target=_work, args=(make, self._shared), daemon=True)
            self._thread.start()
            weakref.finalize(self, _stop, self._shared, self._thread)  # also when the interpreter ends

    def get(self) -> T:
        """The next result, in order. Raises what `make` raised in place of it, then and ever after."""
        if self._thread is not None:
            return self._shared.take()
        if self._shared.error:
            raise self._shared.error
        try:
            return self._make()
        except BaseException as error:
            self._shared.error = error
            raise

    def close(self) -> None:
        """End the thread, waiting a second for it if it is in the middle of something."""
        _stop(self._shared, self._thread)


class _Shared(Generic[T]):
    def __init__(self, depth: int) -> None:
        self.changed = threading.Condition()
        self.depth, self.stopped = depth, False
        self.results: collections.deque[T] = collections.deque()
        self.error: BaseException | None = None

    def put(self, result: T) -> bool:
        """Wait for room. False: nobody wants it any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.results) < self.depth)
            self.results.append(result)
            self.changed.notify_all()
            return not self.stopped

    def take(self) -> T:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.results or self.error)
            if self.results and not self.stopped:
                self.changed.notify_all()
                return self.results.popleft()
            raise self.error or RuntimeError("it was closed")


def _work(make: Callable[[], T], shared: _Shared[T]) -> None:
    try:
        while shared.put(make()):
            pass
    except BaseException as error:  # it belongs to whoever waits for the result
        with shared.changed:
            shared.error = error
            shared.changed.notify_all()


def _stop(shared: _Shared[T], thread: threading.Thread | None) -> None:
    with shared.changed:
        shared.stopped = True
        shared.changed.notify_all()
    if thread is not None and thread is not threading.current_thread():
        thread.join(timeout=1)
