"""Attention of few queries over pages of keys and values, by the kernel in attend.c."""

import ctypes

import torch
from torch import Tensor

from cabochon.model.kernels.native import LANES, Floats, floats, usable


class _Attend(ctypes.Structure):
    _fields_ = (
        ("q", Floats), ("out", Floats), ("keys", Floats), ("values", Floats),
        ("pages", ctypes.c_void_p), ("position", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("queries", "heads", "kv_heads", "size", "page", "stride", "window")),
        ("scale", ctypes.c_float), ("cap", ctypes.c_float),
    )  # fmt: skip


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """Soft-capped attention of single queries over their own pages; None where the kernel cannot.

    Args:
        q: [T, N, H], float32 or bfloat16, rotated.
        keys, values: [pages, K, P, H] of one layer.
        pages: int32 [T, blocks], the page of each block of P positions of a query's sequence.
        positions: int64 [T]; a query sees the positions up to its own, `window` of them at most.

    Returns:
        [T, N, H] in q's dtype.
    """
    native = usable(q, keys, values)
    if native is None or q.shape[2] % LANES:
        return None
    out = torch.empty_like(q)
    queries, heads, size = q.shape
    call = _Attend(
        floats(q), floats(out), floats(keys), floats(values), pages.data_ptr(), positions.data_ptr(),
        queries, heads, keys.shape[1], size, keys.shape[2], pages.shape[1], window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    if native.cabochon_attend(ctypes.byref(call)):
        raise MemoryError("no memory for attention scores")
    return out
