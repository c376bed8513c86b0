"""Batches of a stored teacher: packed rows with what the teacher said at each counted position.

Rows are met in an order that depends on the seed and the epoch alone, epoch after epoch without a gap. A batch is the
next so many of them, and rank r of W has rows r, r + W, ... of it. So where a run stands is one number, which means the
same for any number of ranks.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher_format import ENTRY_ARRAYS, ROW_ARRAYS, Array, counted, decode
from cabochon.data.teacher_index import TeacherIndex, read_index
from cabochon.data.teacher_shards import ShardReader


@dataclass(frozen=True)
class TeacherBatch(Batch):
    """A batch with k entries of the teacher's distribution for each position, 0 where nothing is counted.

    Args:
        teacher_ids: int32 [B, T, k].
        probabilities: float32 [B, T, k], the teacher's own, at its temperature.
        weights: float32 [B, T, k], what each entry counts for, of a sampled teacher; None: the k likeliest ids.
    """

    teacher_ids: Tensor
    probabilities: Tensor
    weights: Tensor | None

    def split(self, rows: int) -> "Iterator[TeacherBatch]":
        """The batch in pieces of so many rows."""
        for first in range(0, len(self.ids), rows):
            part = slice(first, first + rows)
            yield TeacherBatch(
                self.ids[part],
                self.targets[part],
                self.documents[part],
                self.teacher_ids[part],
                self.probabilities[part],
                None if self.weights is None else self.weights[part],
            )


class TeacherStream:
    """An iterator of this rank's part of each batch. Made by `open_teacher`; use it in a `with` block.

    Attributes:
        index: what index.json says.
        batches: how many there are, None without an end.
    """

    def __init__(self, folder: Path, index: TeacherIndex, order: "_Order", prefetch: int) -> None:
        self.index, self._folder, self._order = index, folder, order
        self.batches = order.batches
        self._reader = ShardReader(folder, index)
        self._worker = ThreadPoolExecutor(1, "teacher") if prefetch else None
        self._ahead: deque[Future[TeacherBatch]] = deque()
        self._prefetch, self._place = prefetch, 0  # rows of all ranks that were handed out

    def __iter__(self) -> Iterator[TeacherBatch]:
        return self

    def __next__(self) -> TeacherBatch:
        """The next batch; the last one is filled up with filler. Raises as `ShardReader.row`."""
        if self._order.is_over(self._place):
            raise StopIteration
        batch = self._read(self._place) if self._worker is None else self._next_ahead(self._worker)
        self._place += self._order.rows
        return batch

    def state(self) -> dict[str, Any]:
        """JSON-able: where all ranks stand after the batch last handed out."""
        return {"row": self._place, **self._order.settled(), "teacher": self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks. Raises `UsageError` for that of other rows."""
        now = self.state()
        differing = [name for name in now if name != "row" and state.get(name) != now[name]]
        if differing:
            raise UsageError(
                f"the run cannot go on with {self._folder}",
                f"{differing[0]} was {state.get(differing[0])!r} and is {now[differing[0]]!r}",
                "use the same stored teacher in the same order, or start a new run",
            )
        self._forget_ahead()
        self._place = int(state["row"])

    def remarks(self) -> list[str]:
        """Nothing: what was wrong with the rows was said when they were stored."""
        return []

    def empty(self) -> TeacherBatch:
        """A batch of nothing but filler."""
        return self._batch([None] * (self._order.rows // self._order.world))

    def close(self) -> None:
        """End the thread and let go of the files. Safe to call twice."""
        self._forget_ahead()
        if self._worker:
            self._worker.shutdown()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> str:
        return self.index.shards[0].sha256

    def _next_ahead(self, worker: ThreadPoolExecutor) -> TeacherBatch:
        place = self._place + len(self._ahead) * self._order.rows
        while len(self._ahead) < self._prefetch and not self._order.is_over(place):
            self._ahead.append(worker.submit(self._read, place))
            place += self._order.rows
        return self._ahead.popleft().result()

    def _forget_ahead(self) -> None:
        waiting = [future for future in self._ahead if not future.cancel()]
        self._ahead.clear()
        for future in waiting:  # the reader is of one thread at a time
            future.exception()

    def _read(self, place: int) -> TeacherBatch:
        numbers = self._order.numbers(place)
        return self._batch([None if number is None else self._reader.row(number) for number in numbers])

    def _batch(self, rows: list[dict[str, Array] | None]) -> TeacherBatch:
        """Rows, or filler where there is None, as tensors."""
        facts = self.index.facts
        present = [row for row in rows if row is not None]
        at = np.array([i for i, row in enumerate(rows) if row is not None], np.int64)
        table = np.zeros((len(ROW_ARRAYS), len(rows), facts.length), np.int64)
        table[1] = IGNORED
        for r, row in zip(at, present, strict=True):
            table[:, r] = [row[name] for name in ROW_ARRAYS]
        shape = (len(rows), facts.length, facts.k)
        dense = [np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        if present:
            entries = {name: np.concatenate([row[name] for row in present]) for name in ENTRY_ARRAYS}
            decoded = decode(entries, facts.kind, facts.vocab_size)
            self._check_ids(table[:2], decoded[0])
            where = counted(table[1])
            for out, values in zip(dense, decoded, strict=True):
                if values is not None:
                    out[where] = values
        ids, targets, documents, teacher_ids, probabilities, weights = map(torch.from_numpy, (*table, *dense))
        sampled = facts.kind == "sampled"
        return TeacherBatch(ids, targets, documents, teacher_ids, probabilities, weights if sampled else None)

    def _check_ids(self, table: Array, entries: Array) -> None:
        largest = max(int(table.max()), int(entries.max(initial=0)))
        if largest >= self.index.facts.vocab_size:
            raise BadInput(
                f"{self._folder} cannot be used",
                f"it has the id {largest} and says that there are {self.index.facts.vocab_size} ids",
                "the files do not belong together: copy the folder again, or make it anew",
            )


@dataclass
class _Order:
    """Which row comes when. `total` rows are stored; `rows` make a batch of all ranks."""

    total: int
    rows: int
    rank: int
    world: int
    seed: int
    epochs: int | None
    shuffle: bool

    def __post_init__(self) -> None:
        self._epoch, self._numbers = -1, np.arange(0)

    @property
    def batches(self) -> int | None:
        """Of all epochs."""
        return None if self.epochs is None else -(-self.epochs * self.total // self.rows)

    def settled(self) -> dict[str, Any]:
        """What has to be the same when a run goes on."""
        return {"rows": self.total, "seed": self.seed, "shuffle": self.shuffle}

    def is_over(self, place: int) -> bool:
        """Whether no row is left at this place."""
        return self.epochs is not None and place >= self.epochs * self.total

    def numbers(self, place: int) -> list[int | None]:
        """This rank's rows of the batch that begins at a place; None behind the end."""
        return [self._number(place + lane) for lane in range(self.rank, self.rows, self.world)]

    def _number(self, place: int) -> int | None:
        if self.is_over(place):
            return None
        epoch, at = divmod(place, self.total)
        if not self.shuffle:
            return at
        if epoch != self._epoch:
            # The old generator of numpy, because it alone is promised to give the same numbers in every version.
            draw = np.random.RandomState([self.seed & 0xFFFFFFFF, epoch])
            self._epoch, self._numbers = epoch, draw.permutation(self.total)
        return int(self._numbers[at])


def open_teacher(
    folder: Path,
    *,
    rows: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    prefetch: int = 2,
) -> TeacherStream:
    """Training batches of a folder that `cabochon teacher-logits` wrote.

    Args:
        rows: those of all ranks together, of which rank r has rows r, r + world, ...
        epochs: how often each row comes; None: endless. The last batch is filled up, so all ranks end together.
        prefetch: batches made ahead by a thread; 0: each when it is asked for.

    Raises:
        UsageError: the rows cannot be shared evenly.
        MissingResource, BadInput: as `read_index`; while reading, when a row is not what was written.
    """
    if rows < 1 or rows % world:
        raise UsageError(
            f"batches cannot have {rows} rows", f"{world} ranks share them evenly", f"use a multiple of {world}"
        )
    index = read_index(folder)
    order = _Order(index.totals.rows, rows, rank, world, seed, epochs, shuffle)
    return TeacherStream(folder, index, order, prefetch)
