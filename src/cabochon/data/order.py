"""In which order documents are met, and by which row of a batch.

A batch has as many lanes as rows. Every document of an epoch belongs to one lane, which packs its own row of each
batch. So a rank needs only the documents of its own lanes, and how many ranks there are changes nothing.
"""

import heapq

import numpy as np

from cabochon.data.records import Numbers

WINDOW = 10_000  # rows that are shuffled among each other where reading far apart is slow
BALANCED = 1 << 18  # documents at the end of an epoch that are dealt by size


def random_state(*seeds: int) -> np.random.RandomState:
    """The old generator of numpy, because it alone is promised to give the same numbers in every version."""
    return np.random.RandomState([seed & 0xFFFFFFFF for seed in seeds])


def shuffled(groups: Numbers, seeds: tuple[int, ...]) -> Numbers:
    """A permutation of all rows: uniform where each is a group of its own.

    Rows in longer groups are read together. The groups are put in a random order, and rows change places within
    stretches of `WINDOW`, so that only the groups of one stretch are in use at a time.
    """
    draw = random_state(*seeds)
    count = int(groups.sum())
    if len(groups) == count:
        return draw.permutation(count)
    order = draw.permutation(len(groups))
    starts = np.cumsum(groups) - groups
    lengths = groups[order]
    within = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.repeat(starts[order], lengths) + within
    for at in range(0, count, WINDOW):
        draw.shuffle(rows[at : at + WINDOW])
    return rows


def held_out(count: int, share: float, seed: int) -> Numbers:
    """The numbers, in order, of the rows that are kept for evaluation: that share of them, rounded, at least one."""
    wanted = max(1, round(count * share)) if share else 0
    return np.sort(random_state(seed, 0x48454C44).permutation(count)[:wanted])


def deal(sizes: Numbers, lanes: int, first: int) -> Numbers:
    """The lane of each document, so that all lanes get nearly the same amount.

    Most take turns, beginning with lane `first`. The last ones each go to the lane that has least, so that lanes run
    out of documents at nearly the same time.
    """
    count = len(sizes)
    turns = max(0, count - BALANCED) // lanes * lanes
    owners = (np.arange(count) + first) % lanes
    loads = np.bincount(owners[:turns], weights=sizes[:turns], minlength=lanes)
    heap = [(int(loads[(first + turn) % lanes]), turn) for turn in range(lanes)]
    heapq.heapify(heap)
    for i, size in enumerate(sizes[turns:].tolist(), start=turns):
        load, turn = heap[0]
        owners[i] = (first + turn) % lanes
        heapq.heapreplace(heap, (load + size, turn))
    return owners
