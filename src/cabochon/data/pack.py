"""Documents of any length packed into full rows, with no attention from one to the next.

Dimension letters: B rows, T positions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that no loss counts


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


def pack(examples: Iterable[Example], rows: int, length: int, *, split: bool) -> Iterator[Batch]:
    """Fill rows of `length` tokens, example after example.

    With `split` an example that does not fit goes on in the next row (running text). Without it the rest of
    the row is padding, so that every conversation starts with its own beginning; one longer than a row is cut.
    """
    finished: list[tuple[list[int], list[int], list[int]]] = []
    row = _Row(length)
    for example in examples:
        pairs = _shifted(example)
        if not split:
            pairs = pairs[:length]
        if not split and len(pairs) > row.space:
            finished.append(row.close())
            row = _Row(length)
        while pairs:
            pairs = row.add(pairs)
            if row.space == 0:
                finished.append(row.close())
                row = _Row(length)
        while len(finished) >= rows:
            yield Batch(*(torch.tensor(part) for part in zip(*finished[:rows], strict=True)))
            del finished[:rows]


def stack(first: Batch, second: Batch) -> Batch:
    """The rows of two batches of one length, one below the other."""
    pairs = zip(
        (first.ids, first.targets, first.documents), (second.ids, second.targets, second.documents), strict=True
    )
    return Batch(*(torch.cat(pair) for pair in pairs))


def _shifted(example: Example) -> list[tuple[int, int]]:
    """(input, target) pairs: each id with the one that follows it."""
    following = zip(example.ids[1:], example.learned[1:], strict=True)
    targets = [i if learned else IGNORED for i, learned in following]
    return list(zip(example.ids[:-1], targets, strict=True))


class _Row:
    def __init__(self, length: int) -> None:
        self.length, self.space, self.document = length, length, 0
        self.ids: list[int] = []
        self.targets: list[int] = []
        self.documents: list[int] = []

    def add(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take what fits as the row's next document; returns the rest."""
        now, rest = pairs[: self.space], pairs[self.space :]
        self.ids += [i for i, _ in now]
        self.targets += [t for _, t in now]
        self.documents += [self.document] * len(now)
        self.document += 1
        self.space -= len(now)
        return rest

    def close(self) -> tuple[list[int], list[int], list[int]]:
        return (
            self.ids + [0] * self.space,
            self.targets + [IGNORED] * self.space,
            self.documents + [self.document] * self.space,
        )
