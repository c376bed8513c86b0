"""Attention over pages of keys and values, by the kernel in attend.c."""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.base.errors import CabochonError
from cabochon.model.kernels.native import LANES, Floats, floats, usable
from cabochon.model.proof import failures
from cabochon.model.visibility import Visibility


class _Attend(ctypes.Structure):
    _fields_ = (
        ("q", Floats), ("out", Floats), ("keys", Floats), ("values", Floats),
        *((name, ctypes.c_void_p) for name in ("pages", "row", "position")),
        *((name, ctypes.c_int64) for name in ("queries", "heads", "kv_heads", "size", "page", "stride", "window")),
        ("scale", ctypes.c_float), ("cap", ctypes.c_float),
    )  # fmt: skip


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """Soft-capped attention of queries over their own sequence's pages; None where the kernel cannot.

    Args:
        q: [T, N, H], float32 or bfloat16, rotated.
        keys, values: [pages, K, P, H] of one layer.
        pages: int32 [sequences, blocks], the page of each block of P positions.
        rows: int64 [T], the sequence of each query; those of one sequence are neighbours, in order of position.
        positions: int64 [T]; a query sees the positions up to its own, `window` of them at most.

    Returns:
        [T, N, H] in q's dtype.
    """
    native = usable(q, keys, values)
    if native is None or q.shape[2] % LANES:
        return None
    if q.dtype not in _PROVED:
        prove(q.dtype)
    out = torch.empty_like(q)
    queries, heads, size = q.shape
    call = _Attend(
        floats(q), floats(out), floats(keys), floats(values), pages.data_ptr(), rows.data_ptr(), positions.data_ptr(),
        queries, heads, keys.shape[1], size, keys.shape[2], pages.shape[1], window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    if native.cabochon_attend(ctypes.byref(call)):
        raise MemoryError("no memory for attention scores")
    return out


_PROVED: set[torch.dtype] = set()


def prove(dtype: torch.dtype) -> None:
    """Let the kernel show that its cap, window and scale are real; raises `CabochonError` with what it got wrong."""
    _PROVED.add(dtype)  # first, since the proof itself calls it
    wrong = failures(as_backend, "cpu", dtype, whole_texts_only=True)
    if wrong:
        _PROVED.discard(dtype)
        raise CabochonError(
            "the compiled attention kernel is refused on this processor",
            f"it differs from the float32 oracle in: {', '.join(wrong)}",
            "install cabochon again, and see `cabochon doctor`; answers from this kernel would be wrong",
        )


def as_backend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """The kernel with the arguments of `attention.py`, for one text whose key j lies at position j."""
    page, blocks = 4, -(-k.shape[2] // 4)
    missing = blocks * page - k.shape[2]
    keys, values = (
        pad(t[0], (0, 0, 0, missing)).unflatten(1, (blocks, page)).transpose(0, 1).contiguous() for t in (k, v)
    )
    table = torch.arange(blocks, dtype=torch.int32)[None]
    positions, rows = visible.query_positions[0].contiguous(), torch.zeros(q.shape[2], dtype=torch.long)
    flat = q[0].transpose(0, 1).contiguous()
    mixed = attend_pages(
        flat, keys, values, table, rows, positions, window=visible.window, scale=scale, softcap=softcap
    )
    assert mixed is not None
    return mixed.transpose(0, 1)[None]
