"""Tensors made row by row as inputs of a merge: what an adapter or another vocabulary makes of stored ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.merge.methods.blocks import BLOCK, Whole
from cabochon.weights.rows import Rows


@dataclass(frozen=True)
class _Made(Whole):
    """`tensors` and `base` have no values, only the shape that all inputs have."""

    makers: tuple[Rows, ...] = ()  # of `inputs`, in their order

    def stored(self, rows: range) -> list[Tensor]:
        return [make(rows.start, rows.stop) for make in self.makers]


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
