"""One row of every batch: the documents that are dealt to it, packed, from any place on."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cabochon.base.errors import BadInput
from cabochon.data.config import Shape
from cabochon.data.format import record_examples
from cabochon.data.pack import IGNORED, Ids, Packer, Row, Waiting, shifted
from cabochon.data.records import BadRow, Record
from cabochon.data.supply import Position, Supply
from cabochon.text.tokenizer import Tokenizer

LOOKAHEAD = 64  # documents that are tokenised ahead, among which the one that fits best is chosen
QUOTED = 5  # bad rows
PATIENCE = 100_000  # bad rows one after the other, however many there may be
_GOLDEN = 0.6180339887498949  # multiples of it fall evenly between 0 and 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as (input, target) pairs [2, N] of each of its documents."""

    documents: tuple[Ids, ...]
    split: bool
    truncated: bool


def encode(tokenizer: Tokenizer, record: Record, shape: Shape, *, fold: bool, length: int) -> Encoded:
    """Running text whole; anything else cut to `length` tokens. Raises `BadRow` when it cannot be used."""
    documents = [shifted(example) for example in record_examples(tokenizer, record, shape, fold=fold)]
    if not all(pairs.size for pairs in documents):
        raise BadRow("it is too short to learn from")
    if shape == "text":
        return Encoded(tuple(documents), split=True, truncated=False)
    cut = _cut(documents, length)
    if any((pairs[1] == IGNORED).all() for pairs in cut):
        longer = "make rows longer (--length), or leave out what is too long before its answer begins"
        raise BadRow(f"nothing to learn is in its first {length} tokens", hint=longer)
    return Encoded(cut, split=False, truncated=sum(map(np.size, cut)) < sum(map(np.size, documents)))


def _cut(documents: Sequence[Ids], length: int) -> tuple[Ids, ...]:
    """One document, or the two of a pair, to fit a row together; of a pair the longer one is cut first."""
    if len(documents) == 1:
        return (documents[0][:, :length],)
    first, second = (pairs.shape[1] for pairs in documents)
    half = length // 2
    room = max(half, length - second) if first + second > length else first
    first = min(first, room)
    return documents[0][:, :first], documents[1][:, : length - first]


class Tally:
    """Bad rows of all lanes of a rank, those before a restart included. One more than `limit` raises `BadInput`."""

    def __init__(self, limit: int, count: int = 0) -> None:
        self.limit, self.count = limit, count
        self.quoted: list[str] = []
        self._lock = threading.Lock()

    def add(self, place: str, error: BadRow) -> None:
        """Count a row; the first few are kept to be quoted."""
        with self._lock:
            self.count += 1
            if len(self.quoted) < QUOTED:
                self.quoted.append(f"{place}: {error}")
            if self.count > self.limit:
                raise too_many(self.count, self.quoted, self.limit, error.hint)


def too_many(count: int, quoted: Sequence[str], limit: int, hint: str) -> BadInput:
    """More bad rows than are allowed."""
    allowed = f"{limit} may be skipped" if limit else "none may be skipped"
    return BadInput(
        f"the data has {count} bad row{'s' * (count != 1)}, and {allowed}",
        "; ".join(quoted),
        hint or f"correct them, or allow more: max_bad_rows = {10 * max(1, limit)} (--max-bad-rows)",
    )


class Lane:
    """Packs one row of each batch out of what its supplies give it: by weight, or one supply after the other."""

    def __init__(
        self,
        number: int,
        supplies: Sequence[Supply],
        weights: Sequence[float] | None,
        encoders: Sequence[Callable[[Record], Encoded]],
        tally: Tally,
        *,
        length: int,
        packing: bool,
    ) -> None:
        self.number, self._supplies, self._encoders, self._tally = number, supplies, encoders, tally
        self._weights = None if weights is None else np.array(weights, np.float64) / sum(weights)
        self._packer = Packer(self._take, length, lookahead=LOOKAHEAD, packing=packing)
        self._given = [0] * len(supplies)  # tokens taken from each
        self._counts = dict.fromkeys(("tokens", "documents", "truncated", "bad"), 0)
        self._failed = 0  # rows since the last usable one

    def next_row(self) -> Row | None:
        """The next row, or None when the last epoch is over. Raises `BadInput` with too many bad rows."""
        row = self._packer.next_row()
        if row is not None:
            self._counts["tokens"] += row.used
        return row

    def state(self) -> dict[str, Any]:
        """JSON-able: where the lane stands after the row last made."""
        waiting = [[*w.origin, w.offset] for w in self._packer.waiting]
        at = [list(supply.position(self.number)) for supply in self._supplies]
        return {"at": at, "waiting": waiting, "given": list(self._given), **self._counts}

    def seek(self, state: Mapping[str, Any]) -> None:
        """First half of taking up a state; then `restore`, when all lanes have done this."""
        for part, supply in enumerate(self._supplies):
            waiting = [(epoch, count) for p, epoch, count, _ in state["waiting"] if p == part]
            supply.seek(self.number, min([_position(state["at"][part]), *waiting]))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Read again what was waiting, and stand where the state was taken."""
        offsets = {(part, epoch, count): offset for part, epoch, count, offset in state["waiting"]}
        found: dict[tuple[int, int, int], Waiting] = {}
        for part, supply in enumerate(self._supplies):
            end = _position(state["at"][part])
            while supply.position(self.number) < end and (taken := supply.take(self.number)):
                origin = (part, *taken[0])
                if origin in offsets:
                    encoded = self._encoders[part](taken[1])
                    found[origin] = Waiting(
                        encoded.documents, split=encoded.split, origin=origin, offset=offsets[origin]
                    )
        self._packer.waiting = [found[origin] for origin in offsets]
        self._given = list(state["given"])
        self._counts = {name: int(state[name]) for name in self._counts}

    def _take(self) -> Waiting | None:
        """The next usable document."""
        while True:
            part, taken = self._next()
            if taken is None:
                return None
            (epoch, count), record = taken
            try:
                encoded = self._encoders[part](record)
            except BadRow as error:
                self._skip(part, epoch, record, error)
                continue
            self._failed = 0
            self._given[part] += sum(pairs.shape[1] for pairs in encoded.documents)
            self._counts["documents"] += 1
            self._counts["truncated"] += encoded.truncated
            return Waiting(encoded.documents, split=encoded.split, origin=(part, epoch, count))

    def _next(self) -> tuple[int, tuple[Position, Record] | None]:
        """A source, and its next document for this lane."""
        if self._weights is not None:
            part = self._choose(self._weights)
            return part, self._supplies[part].take(self.number)
        for part, supply in enumerate(self._supplies):
            if taken := supply.take(self.number):
                return part, taken
        return 0, None

    def _choose(self, weights: npt.NDArray[np.float64]) -> int:
        """The source that is furthest behind its share of the tokens; lanes begin with different ones."""
        total = sum(self._given)
        if not total:
            place = (self.number + 1) * _GOLDEN % 1
            return min(int(np.searchsorted(np.cumsum(weights), place)), len(weights) - 1)
        return int(np.argmax(weights * total - self._given))

    def _skip(self, part: int, epoch: int, record: Record, error: BadRow) -> None:
        self._failed += 1
        if epoch == 0:  # later ones are the same rows again
            self._counts["bad"] += 1
            self._tally.add(record.place, error)
        size = self._supplies[part].size()
        if self._failed > max(PATIENCE, size[0] if size else 0):  # or it would look for ever
            raise BadInput("no row of the data can be used", f"{record.place}: {error}", error.hint or "correct them")


def _position(pair: Sequence[int]) -> Position:
    epoch, count = pair
    return epoch, count
