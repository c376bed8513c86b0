"""Exact order statistics of tensors too large to sort: values at given ranks, and where to cut off the n largest.

The bits of a float, read as a whole number, sort as the floats do. So one pass counts the upper 16 bits of every
value, which shows where a rank lies, and a second counts the lower 16 bits of the values there: two tables of at most
65,536 counts find it exactly. A third pass runs only if equal values lie on both sides of a cut.

Several streams of values, one for each model, are counted in the same passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cabochon.merge.methods.blocks import Block, Whole

Counts = np.ndarray  # int64
Keys = Callable[[Block], Sequence[Tensor]]  # from a block to int32 [r, C] for each stream
BINS = 1 << 16


@dataclass(frozen=True)
class Found:
    """The key at a rank, how many are smaller, and how many are equal to it."""

    key: int
    smaller: int
    equal: int

    @property
    def value(self) -> float:
        """The float whose key it is."""
        return float(np.array(self.key if self.key >= 0 else self.key ^ 0x7FFFFFFF, np.int32).view(np.float32))


@dataclass(frozen=True)
class Cut:
    """Where the n largest magnitudes end: larger ones than `value` are among them, and equal ones up to `index`.

    Of equal magnitudes the earlier in the tensor therefore counts as the larger.
    """

    value: float
    index: int


def magnitude_keys(values: Tensor) -> Tensor:
    """Whole numbers from 0 that sort as the magnitudes of float32 values."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


def signed_keys(values: Tensor) -> Tensor:
    """Whole numbers that sort as float32 values do; 0 and -0 are equal."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def find(whole: Whole, keys: Keys, ranks: Sequence[Sequence[int]], *, signed: bool = False) -> list[list[Found]]:
    """For each stream, what stands at some ranks of ascending order, counted from 0; `signed` allows keys below 0."""
    lowest = -(BINS // 2) if signed else 0
    upper = _total(whole, lambda block: [_count_upper(key, lowest) for key in keys(block)], len(ranks))
    places = [[_place(counts, rank) for rank in wanted] for counts, wanted in zip(upper, ranks, strict=True)]
    bins = sorted({(stream, place) for stream, found in enumerate(places) for place, _ in found})

    def count(block: Block) -> list[Counts]:
        streams = [key.reshape(-1).numpy() for key in keys(block)]
        return [_count_lower(streams[stream], place + lowest) for stream, place in bins]

    lower = dict(zip(bins, _total(whole, count, len(bins)), strict=True))

    def found(stream: int, rank: int, place: int, before: int) -> Found:
        low, smaller = _place(lower[stream, place], rank - before)
        equal = int(lower[stream, place][low])
        return Found(((place + lowest) << 16) | low, before + smaller, equal)

    return [
        [found(stream, rank, *at) for rank, at in zip(wanted, places[stream], strict=True)]
        for stream, wanted in enumerate(ranks)
    ]


def _total(whole: Whole, counts: Callable[[Block], list[Counts]], many: int) -> list[Counts]:
    """Tables of counts, added up over all blocks."""
    totals = [np.zeros(BINS, np.int64) for _ in range(many)]
    for tables in whole.map(counts):
        for total, table in zip(totals, tables, strict=True):
            total[: len(table)] += table
    return totals


def _count_upper(key: Tensor, lowest: int) -> Counts:
    """How often each upper half occurs, from the lowest."""
    upper = key.reshape(-1) >> 16
    counted: Counts = torch.bincount(upper - lowest if lowest else upper).numpy()
    return counted


def _count_lower(key: Counts, upper: int) -> Counts:
    """How often each lower half occurs beside one upper half."""
    offset = key ^ np.int32(upper << 16)  # the lower half, where the upper one is the wanted
    return np.bincount(offset[offset.view(np.uint32) < BINS])


def _place(counts: Counts, rank: int) -> tuple[int, int]:
    """The entry of a table in which a rank falls, and how many come before that entry."""
    sums = counts.cumsum()
    place = int(np.searchsorted(sums, rank, side="right"))
    return place, int(sums[place] - counts[place])


def cuts(whole: Whole, keys: Keys, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For each stream and each number n of 1 to all, where the n largest end; keys are `magnitude_keys`."""
    last = whole.numel - 1
    found = find(whole, keys, [[whole.numel - n for n in wanted] for wanted in counts])
    requests: dict[tuple[int, int], tuple[int, int]] = {}
    for stream, wanted in enumerate(counts):
        for which, (n, at) in enumerate(zip(wanted, found[stream], strict=True)):
            kept = n - (whole.numel - at.smaller - at.equal)
            if kept < at.equal and at.key:  # which zeros are kept makes no difference
                requests[stream, which] = (at.key, kept)
    indices = _nth_equal(whole, keys, [(stream, *pair) for (stream, _), pair in requests.items()])
    ends = dict(zip(requests, indices, strict=True))
    return [
        [Cut(at.value, ends.get((stream, which), last)) for which, at in enumerate(found[stream])]
        for stream in range(len(counts))
    ]


def _nth_equal(whole: Whole, keys: Keys, requests: Sequence[tuple[int, int, int]]) -> list[int]:
    """For requests (stream, key, n), the index of the n-th element with that key, counted from 1."""
    if not requests:
        return []

    def count(block: Block) -> list[int]:
        streams = keys(block)
        return [int(np.count_nonzero(streams[stream].numpy() == key)) for stream, key, _ in requests]

    sums = np.array(list(whole.map(count))).cumsum(0)
    spans = list(whole.blocks())
    result = []
    for request, (stream, key, n) in enumerate(requests):
        number = int(np.searchsorted(sums[:, request], n))
        block = whole.load(spans[number])
        places = np.flatnonzero(keys(block)[stream].reshape(-1).numpy() == key)
        result.append(block.start + int(places[n - 1 - (sums[number - 1, request] if number else 0)]))
    return result
