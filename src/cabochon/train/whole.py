"""Whole tensors for the process that writes, one at a time, while every process has only parts of them.

The first process does the writing and asks for a tensor when it comes to it; the others wait to be asked. So whatever
writes a model from one process writes it from many, in memory for one tensor, and when the disk is full none is left
waiting.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from cabochon.train.ranks import Ranks
from cabochon.train.shards import box, is_sharded, local, slices

T = TypeVar("T")
Whole = Callable[[str], Tensor]  # a tensor by its name; for the first process alone
Boxes = list[tuple[list[int], list[int]]]  # by rank: where its part begins, and its size
_DONE = -1


def writing(ranks: Ranks, tensors: Mapping[str, Tensor], action: Callable[[Whole], T]) -> T:
    """Let the first process do what needs whole tensors. Called by all, with the same names in one order.

    Args:
        ranks: of the run.
        tensors: sharded or not.
        action: called on the first process; what it gives has to be JSON, and all ranks get it.

    Raises what `action` raises, and `Elsewhere` on the other ranks.
    """
    if ranks.world == 1:
        return action(tensors.__getitem__)
    names = list(tensors)
    boxes: list[Boxes] = ranks.gather([box(tensor) if is_sharded(tensor) else None for tensor in tensors.values()])

    def hand_over(index: int) -> Tensor:
        return _collect(ranks, tensors[names[index]], [each[index] for each in boxes])

    def ask(name: str) -> Tensor:
        if not is_sharded(tensors[name]):
            return tensors[name]
        index = names.index(name)
        _told(ranks, index)
        return hand_over(index)

    def answered() -> T:
        try:
            return action(ask)
        finally:
            _told(ranks, _DONE)

    while not ranks.first and (index := _told(ranks, _DONE)) != _DONE:
        hand_over(index)
    return ranks.on_first(answered)


def _told(ranks: Ranks, number: int) -> int:
    """What number the first process says."""
    said = torch.tensor(number)
    torch.distributed.broadcast(said, 0)
    return int(said)


def _collect(ranks: Ranks, tensor: Tensor, places: Boxes) -> Tensor:
    """The whole tensor, on the CPU of the first process; the others get nothing to speak of."""
    part = local(tensor).detach().flatten()
    given = [part.numel()] + [0] * (ranks.world - 1)
    taken = [math.prod(size) if ranks.first else 0 for _, size in places]
    out = part.new_empty(sum(taken))
    torch.distributed.all_to_all_single(out, part, taken, given)
    whole = torch.empty(tensor.shape if ranks.first else (0,), dtype=tensor.dtype)
    if ranks.first:
        for piece, (offsets, sizes) in zip(out.split(taken), places, strict=True):
            whole[slices(offsets, sizes)] = piece.view(sizes).cpu()
    return whole
