"""Tensors row by row: so one that is larger than memory is changed while it is read."""

from collections.abc import Callable

import torch
from torch import Tensor

# Gives rows from start up to, without, stop as float32 [r, C]; called from several threads.
Rows = Callable[[int, int], Tensor]


def stored_rows(tensor: Tensor) -> Rows:
    """The rows of a tensor as it is; one with a single dimension is one row."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    flat = tensor.reshape(-1, columns)
    return lambda start, stop: flat[start:stop].to(torch.float32)
