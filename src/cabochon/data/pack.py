"""Documents of any length packed into full rows, with no attention from one to the next.

Dimension letters: B rows, T positions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED = -100  # a target that no loss counts

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One document: its token ids, and for each id whether the model is to learn to produce it."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Batch:
    """int64 tensors [B, T]: inputs, what should follow each (-100: not counted), and document numbers.

    Positions need not restart with each document: rotary angles and the window depend on distances alone.
    """

    ids: Tensor
    targets: Tensor
    documents: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.targets != IGNORED).sum())

    def split(self, rows: int) -> "Iterator[Batch]":
        """The batch in pieces of so many rows."""
        pieces = (part.split(rows) for part in (self.ids, self.targets, self.documents))
        return (Batch(*piece) for piece in zip(*pieces, strict=True))


class Row:
    """One row of a batch while it is filled: int64 [3, T] of inputs, targets and document numbers."""

    def __init__(self, length: int) -> None:
        self.table = np.zeros((3, length), np.int64)
        self.table[1] = IGNORED
        self.used, self.documents = 0, 0

    @property
    def space(self) -> int:
        """Positions that are still filler. Their document number is that of no document."""
        return int(self.table.shape[1]) - self.used

    def add(self, pairs: Ids) -> None:
        """Take (input, target) pairs [2, N] as the row's next document."""
        end = self.used + pairs.shape[1]
        self.table[:2, self.used : end] = pairs
        self.used, self.documents = end, self.documents + 1
        self.table[2, self.used - pairs.shape[1] : end] = self.documents - 1
        self.table[2, end:] = self.documents


class Waiting:
    """Documents that stay together, before they have a row: (input, target) pairs [2, N] of each.

    One that can be split goes on in the next row; `offset` counts what of it is in rows already. `length` is what it
    still needs, `origin` the caller's.
    """

    __slots__ = ("documents", "length", "offset", "origin", "split")

    def __init__(self, documents: Sequence[Ids], *, split: bool, origin: Any = None, offset: int = 0) -> None:
        self.documents, self.split, self.origin, self.offset = documents, split, origin, offset
        self.length: int = sum(pairs.shape[1] for pairs in documents) - offset


class Packer:
    """Fills rows of `length` tokens from what `take` gives until that is None.

    Each row begins with the document that has waited longest. The rest of it is filled with the longest ones that
    fit, out of the next `lookahead`, or with the beginning of one that can be split. Nothing longer than a row may
    come unsplit. Without `packing`, a row is one document or a part of one.
    """

    def __init__(
        self, take: Callable[[], Waiting | None], length: int, *, lookahead: int, packing: bool = True
    ) -> None:
        self._take, self._length = take, length
        self._lookahead, self._packing = lookahead if packing else 1, packing
        self.waiting: list[Waiting] = []
        self.ended = False

    def next_row(self) -> Row | None:
        """The next row, or None when there is nothing left."""
        if not self.waiting and not self._look_ahead():
            return None
        row = Row(self._length)
        self._place(row, self.waiting[0])
        while self._packing and row.space:
            if found := self._fitting(row.space):
                self._place(row, found)
            elif not self._look_ahead():
                break
        return row

    def _look_ahead(self) -> bool:
        """Take until there is enough to choose from. False: nothing was taken."""
        before = len(self.waiting)
        # One that can be split fills any row, so nothing is read beyond it.
        while not self.ended and len(self.waiting) < self._lookahead and not any(w.split for w in self.waiting):
            taken = self._take()
            if taken is None:
                self.ended = True
            else:
                self.waiting.append(taken)
        return len(self.waiting) > before

    def _fitting(self, space: int) -> Waiting | None:
        whole = [w for w in self.waiting if w.length <= space and not w.split]
        if whole:
            return max(whole, key=_length)  # the first of several
        return next((w for w in self.waiting if w.split), None)

    def _place(self, row: Row, waiting: Waiting) -> None:
        if waiting.split:
            (pairs,) = waiting.documents
            part = pairs[:, waiting.offset : waiting.offset + row.space]
            row.add(part)
            waiting.offset += part.shape[1]
            waiting.length -= part.shape[1]
            if waiting.length:
                return
        else:
            for pairs in waiting.documents:
                row.add(pairs)
        self.waiting.remove(waiting)  # compared by identity


def _length(waiting: Waiting) -> int:
    return waiting.length


def shifted(example: Example) -> Ids:
    """(input, target) pairs [2, N]: each id with the one that follows it, or `IGNORED` where that is not learned."""
    ids = np.array(example.ids, np.int64)
    targets = np.where(np.array(example.learned, bool)[1:], ids[1:], IGNORED)
    return np.stack([ids[:-1], targets])


def as_batch(rows: Sequence[Row]) -> Batch:
    """Rows of one length as tensors."""
    tables = torch.from_numpy(np.stack([row.table for row in rows], axis=1))
    return Batch(*tables)


def pack(examples: Iterable[Example], rows: int, length: int, *, split: bool) -> Iterator[Batch]:
    """Batches of `rows` rows, filled in the order of the examples; what does not fill the last batch is left out.

    With `split` an example that does not fit goes on in the next row (running text). Without it the rest of
    the row is padding, so that every conversation starts with its own beginning; one longer than a row is cut.
    """
    source = (pairs for example in examples if (pairs := shifted(example)).size)

    def take() -> Waiting | None:
        pairs = next(source, None)
        return None if pairs is None else Waiting([pairs if split else pairs[:, :length]], split=split)

    packer = Packer(take, length, lookahead=1)
    finished: list[Row] = []
    while (row := packer.next_row()) and not (packer.ended and row.space):
        finished.append(row)
        if len(finished) == rows:
            yield as_batch(finished)
            finished = []


def stack(first: Batch, second: Batch) -> Batch:
    """The rows of two batches of one length, one below the other."""
    pairs = zip(
        (first.ids, first.targets, first.documents), (second.ids, second.targets, second.documents), strict=True
    )
    return Batch(*(torch.cat(pair) for pair in pairs))
