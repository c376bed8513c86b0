"""Tensors made row by row as inputs of a merge: what an adapter or another vocabulary makes of stored ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.merge.methods.blocks import BLOCK, Block, Whole

# Gives rows from start up to, without, stop as float32 [r, C]; called from several threads.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class _Made(Whole):
    """`tensors` and `base` have no values, only the shape that all inputs have."""

    makers: tuple[Rows, ...] = ()  # of `inputs`, in their order

    def load(self, rows: range) -> Block:
        made = [make(rows.start, rows.stop) for make in self.makers]
        base = None if self.base is None else made.pop()
        return Block(tuple(made), base, rows.start * self.columns)


def whole_of_rows(
    shape: Sequence[int],
    models: Sequence[Rows],
    base: Rows | None = None,
    *,
    run: Callable[..., Iterable[object]] = map,
    block: int = BLOCK,
    names: tuple[str, ...] = (),
) -> Whole:
    """What merge methods take, from functions that make rows of tensors of one shape; else as `Whole`."""
    nothing = torch.empty(tuple(shape), device="meta")
    makers = (*models, base) if base else tuple(models)
    return _Made((nothing,) * len(models), nothing if base else None, run, block, names, makers)


def stored_rows(tensor: Tensor) -> Rows:
    """The rows of a tensor as it is; one with a single dimension is one row."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    flat = tensor.reshape(-1, columns)
    return lambda start, stop: flat[start:stop].to(torch.float32)
