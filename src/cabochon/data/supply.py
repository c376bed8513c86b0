"""What each lane is given of a source, document by document, from any place on."""

import collections
import functools
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from cabochon.data.order import WINDOW, deal, random_state, shuffled
from cabochon.data.records import Numbers, Record, Rows
from cabochon.data.streams import Arriving

Position = tuple[int, int]  # an epoch, and how many of the lane's documents of that epoch come before


class Supply(Protocol):
    """Documents of one source for every lane. Threads may take for different lanes at the same time."""

    def seek(self, lane: int, position: Position) -> None:
        """The next document of the lane is to be that one. Only before anything is taken for any lane."""
        ...

    def position(self, lane: int) -> Position:
        """Where the lane's next document is."""
        ...

    def take(self, lane: int) -> tuple[Position, Record] | None:
        """The lane's next document, or None after the last epoch."""
        ...

    def size(self) -> list[int] | None:
        """Documents and bytes, by which a changed source is noticed; None when unknown."""
        ...


class Shuffled:
    """Rows in files, in a new order in each epoch."""

    def __init__(
        self, rows: Rows, numbers: Numbers, *, lanes: int, seeds: tuple[int, ...], shuffle: bool, epochs: int | None
    ) -> None:
        """`numbers` are the rows that are used, in order."""
        self._rows, self._numbers, self._lanes = rows, numbers, lanes
        self._seeds, self._shuffle, self._epochs = seeds, shuffle, epochs
        self._cursors: list[Position] = [(0, 0)] * lanes
        self._size = [len(numbers), int(rows.sizes.sum())]
        self._lock = threading.Lock()
        # Lanes go from one epoch to the next at nearly the same time, but drift apart where epochs are short.
        kept = max(3, min(256, 1_000_000 // max(1, len(numbers))))
        self._dealt = functools.lru_cache(maxsize=kept)(self._deal)

    def seek(self, lane: int, position: Position) -> None:
        self._cursors[lane] = position

    def position(self, lane: int) -> Position:
        return self._cursors[lane]

    def take(self, lane: int) -> tuple[Position, Record] | None:
        epoch, count = self._cursors[lane]
        while self._epochs is None or epoch < self._epochs:
            with self._lock:  # or two threads would shuffle the same epoch
                own = self._dealt(epoch)[lane]
            if count < len(own):
                self._cursors[lane] = (epoch, count + 1)
                return (epoch, count), self._rows.read(int(own[count]))
            epoch, count = epoch + 1, 0
        return None

    def size(self) -> list[int]:
        return self._size

    def _deal(self, epoch: int) -> list[Numbers]:
        """The rows of each lane in an epoch."""
        order = self._numbers
        if self._shuffle:
            used = np.zeros(len(self._rows.sizes), bool)
            used[self._numbers] = True
            order = shuffled(self._rows.groups, (*self._seeds, epoch))
            order = order[used[order]]
        # Each epoch begins with another lane, so that fewer documents than lanes come round to all of them.
        owners = deal(self._rows.sizes[order], self._lanes, epoch * len(order) % self._lanes)
        by_lane = np.argsort(owners, kind="stable")
        ends = np.cumsum(np.bincount(owners, minlength=self._lanes))
        return np.split(order[by_lane], ends[:-1])


class Passing:
    """Rows that arrive in one order, shuffled within stretches; those of other ranks' lanes are let go."""

    def __init__(
        self,
        arriving: Arriving,
        *,
        lanes: int,
        own: Collection[int],
        seeds: tuple[int, ...],
        shuffle: bool,
        epochs: int | None,
    ) -> None:
        self._arriving, self._lanes, self._seeds = arriving, lanes, seeds
        self._stretch = WINDOW if shuffle else 1
        self._epochs = epochs if arriving.repeats else 1
        self._next: dict[int, Position] = dict.fromkeys(own, (0, 0))
        self._queues: dict[int, collections.deque[tuple[Position, Record]]] = {
            lane: collections.deque() for lane in own
        }
        self._dealt: Iterator[tuple[int, Position, Record]] | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def seek(self, lane: int, position: Position) -> None:
        self._next[lane] = position

    def position(self, lane: int) -> Position:
        return self._next[lane]

    def take(self, lane: int) -> tuple[Position, Record] | None:
        queue = self._queues[lane]
        with self._lock:
            while not queue:
                arrived = self._arrive()
                if arrived is None:
                    return None
                owner, position, record = arrived
                if owner in self._next and position >= self._next[owner]:
                    self._queues[owner].append((position, record))
            taken = queue.popleft()
            epoch, count = taken[0]
            self._next[lane] = (epoch, count + 1)
            return taken

    def size(self) -> None:
        return None

    def _arrive(self) -> tuple[int, Position, Record] | None:
        if self._error:  # what stopped one thread is no end of the data for another
            raise self._error
        if self._dealt is None:
            self._dealt = self._deal()
        try:
            return next(self._dealt, None)
        except Exception as error:
            self._error = error
            raise

    def _deal(self) -> Iterator[tuple[int, Position, Record]]:
        """(lane, position, row) from the first row that a lane still needs."""
        epoch, count = min(self._next.values())
        number = count * self._lanes // self._stretch * self._stretch
        while self._epochs is None or epoch < self._epochs:
            began, rows = number, self._arriving.rows(number)
            while records := list(itertools.islice(rows, self._stretch)):
                for record in self._mixed(records, epoch, number):
                    yield (number + epoch) % self._lanes, (epoch, number // self._lanes), record
                    number += 1
            if number == began == 0:
                return
            epoch, number = epoch + 1, 0

    def _mixed(self, records: Sequence[Record], epoch: int, number: int) -> Sequence[Record]:
        if len(records) == 1:
            return records
        order = random_state(*self._seeds, epoch, number).permutation(len(records))
        return [records[i] for i in order]
