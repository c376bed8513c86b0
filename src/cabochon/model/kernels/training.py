"""The steps between the matrix products of a layer with a way back: one kernel forward, one backward.

autograd would keep every intermediate of the formulas and walk over memory once for each; these keep their inputs and
walk twice. Results have the dtype that the next product wants, so that nothing is converted in between. The caller
asks `usable(..., gradients=True)` first. Plain twins: RMSNorm, rotate and GeGLU in gemma2.py, `plain` in attention.py.

Dimension letters: B batch, T queries, S keys, N query heads, K key-value heads, H head size, D hidden size.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cabochon.model.kernels.native import Floats, floats, library

BLOCK = 256  # queries at a time: fewer make small products, more make scores that nobody sees


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast's dtype where that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis, or that added to `base` of the same shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, base: Tensor | None) -> Tensor:
        """In the dtype of the next product, or in that of the base."""
        native: Any = library()
        d = x.shape[-1]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.has_base = eps, base is not None
        if base is None:
            out = torch.empty_like(x, dtype=product_dtype(x))
            native.cabochon_rms_norm(floats(x), floats(weight), floats(out), x.numel() // d, d, eps)
        else:
            out = torch.empty_like(base)
            native.cabochon_add_norm(floats(base), floats(x), floats(weight), floats(out), x.numel() // d, d, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """For x, weight and base."""
        native: Any = library()
        x, weight = ctx.saved_tensors
        grad, d, threads = grad.contiguous(), x.shape[-1], torch.get_num_threads()
        x_grad, parts = torch.empty_like(x), weight.new_zeros(threads, d, dtype=torch.float32)
        native.cabochon_norm_backward(
            floats(grad),
            floats(x),
            floats(weight),
            floats(x_grad),
            parts.data_ptr(),
            x.numel() // d,
            d,
            ctx.eps,
            threads,
        )
        return x_grad, parts.sum(0).to(weight.dtype), None, grad if ctx.has_base else None


class GeluTimes(torch.autograd.Function):
    """gelu(gate) * up, the tanh form of GELU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Like gate."""
        native: Any = library()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        native.cabochon_gelu_times(floats(gate), floats(up), floats(out), gate.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """For gate and up."""
        native: Any = library()
        gate, up = ctx.saved_tensors
        towards = torch.empty_like(gate), torch.empty_like(up)
        native.cabochon_gelu_times_backward(
            floats(grad.contiguous()), floats(gate), floats(up), *map(floats, towards), gate.numel()
        )
        return towards


class Rotate(torch.autograd.Function):
    """Pairs (i, i + H/2) of x [B, T, heads, H] turned by angles [B, T, 1, H/2]; back means by their negatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Like x."""
        ctx.save_for_backward(cosine, sine)
        return turned(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """For x."""
        cosine, sine = ctx.saved_tensors
        return turned(grad.contiguous(), cosine, -sine), None, None


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, T, heads, H], turned."""
    native: Any = library()
    heads, size = x.shape[2:]
    out = torch.empty_like(x)
    rows = x.numel() // (heads * size)
    native.cabochon_rotate(floats(x), floats(out), cosine.data_ptr(), sine.data_ptr(), rows, heads, size)
    return out


class _Scores(ctypes.Structure):
    _fields_ = (
        ("scores", Floats),
        ("grad", Floats),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class Attention(torch.autograd.Function):
    """Soft-capped attention where every query sees one run of keys: products by torch, what is between them here.

    Only q, k, v are kept: the scores of a block of queries are made again on the way back. Inside, the G = N / K query
    heads of a key-value head lie together, [B, K, T, G, H].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[Tensor, Tensor], scale: float, cap: float
    ) -> Tensor:
        """[B, N, T, H] of q [B, N, T, H], k and v [B, K, S, H]; runs int32 [B, T], two; cap 0: none."""
        q, k, v = _grouped(q, k.shape[1]), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, *runs)
        ctx.settings = scale, cap
        out = torch.empty_like(q)
        for block in _blocks(*runs):
            ours, keys, values = block.of_queries(q), block.of_keys(k), block.of_keys(v)
            scores = torch.bmm(ours, keys.mT)
            _call("cabochon_scores", scores, scores, block, ctx.settings, q.shape[3])
            out[block.row, :, block.queries] = torch.bmm(scores, values).unflatten(1, (-1, q.shape[3]))
        return _ungrouped(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """For q, k, v."""
        q, k, v, *runs = ctx.saved_tensors
        grad = _grouped(grad, k.shape[1])
        wide = torch.promote_types(k.dtype, torch.float32)
        towards_q = torch.empty_like(q)
        towards_k, towards_v = (torch.zeros_like(t, dtype=wide) for t in (k, v))  # sums over blocks
        for block in _blocks(*runs):
            ours, back, keys, values = block.of_queries(q), block.of_queries(grad), block.of_keys(k), block.of_keys(v)
            scores, towards = torch.bmm(ours, keys.mT), torch.bmm(back, values.mT)
            _call("cabochon_scores_backward", scores, towards, block, ctx.settings, q.shape[3])
            towards_v[block.row, :, block.keys] += torch.bmm(scores.mT, back)
            towards_k[block.row, :, block.keys] += torch.bmm(towards.mT, ours)
            towards_q[block.row, :, block.queries] = torch.bmm(towards, keys).unflatten(1, (-1, q.shape[3]))
        return _ungrouped(towards_q), towards_k.to(k.dtype), towards_v.to(v.dtype), None, None, None


@dataclass(frozen=True)
class _Block:
    """Some queries of a row, all keys that one of them sees, and their runs, counted from the first of these keys."""

    row: int
    queries: slice
    keys: slice
    low: Tensor
    high: Tensor

    def of_queries(self, x: Tensor) -> Tensor:
        """The block's part of x [B, K, T, G, H], dense: products of what is not would copy it, each for itself."""
        return x[self.row, :, self.queries].flatten(1, 2).contiguous()

    def of_keys(self, x: Tensor) -> Tensor:
        """The block's part of x [B, K, S, H], dense."""
        return x[self.row, :, self.keys].contiguous()


def _blocks(low: Tensor, high: Tensor) -> Iterator[_Block]:
    for row in range(len(low)):
        for start in range(0, low.shape[1], BLOCK):
            queries = slice(start, min(start + BLOCK, low.shape[1]))
            first, last = low[row, queries], high[row, queries]
            begin, end = int(torch.where(first < last, first, last.max()).min()), int(last.max())
            if begin < end:
                yield _Block(row, queries, slice(begin, end), first - begin, last - begin)
            else:  # nothing is seen; one key, which is masked
                yield _Block(row, queries, slice(0, 1), torch.zeros_like(first), torch.zeros_like(last))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """x [B, N, T, H] as [B, K, T, G, H], dense."""
    apart: Tensor = x.unflatten(1, (kv_heads, -1))
    return apart.transpose(2, 3).contiguous()


def _ungrouped(x: Tensor) -> Tensor:
    """The way back: [B, N, T, H], with T before N in memory, as the next product wants it."""
    batch, kv_heads, length, group, size = x.shape
    plain: Tensor = x.transpose(1, 2).reshape(batch, length, kv_heads * group, size)
    return plain.transpose(1, 2)


def _call(name: str, scores: Tensor, grad: Tensor, block: _Block, settings: tuple[float, float], group: int) -> None:
    heads, _, keys = scores.shape
    low, high = block.low, block.high
    call = _Scores(
        floats(scores), floats(grad), low.data_ptr(), high.data_ptr(), heads, len(low), group, keys, *settings
    )
    getattr(library(), name)(ctypes.byref(call))
