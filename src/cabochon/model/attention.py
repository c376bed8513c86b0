"""Attention with a soft cap, a window and grouped heads: one function, several ways to compute it.

Dimension letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size.
Source: arXiv 2408.00118, section 2 (soft cap: cap * tanh(scores / cap), before the mask).

    plain      the formula, whole score matrix at once
    blockwise  the formula for a block of queries at a time: memory grows linearly with length
    native     the formula for a block of queries, with our own kernel between the products, forward and backward
    flex       torch's flex_attention, cap and window inside one CUDA kernel
    sdpa       torch's scaled_dot_product_attention, which knows no soft cap: only when the caller turned
               the cap off, and only for inference

A backend that quietly leaves out the cap, the window or the scale still produces fluent text. So before a
backend is used on a device for the first time it has to reproduce an oracle (`proof.py`), or it is refused.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cabochon.base.errors import CabochonError, UsageError, nearest
from cabochon.model.kernels import cuda, elementwise, training
from cabochon.model.kernels.native import usable
from cabochon.model.proof import failures
from cabochon.model.visibility import Visibility

Backend = Callable[[Tensor, Tensor, Tensor, Visibility, float, float | None], Tensor]

BLOCK = 128  # queries at a time: scores of 8 heads against 8192 keys then take 32 MiB in float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None,
    backend: str | None = None,
) -> Tensor:
    """Mix values by soft-capped scores: softmax(cap * tanh(q k^T scale / cap) + mask) v.

    Args:
        q: [B, N, T, H], rotated.
        k, v: [B, K, S, H]; head n reads key-value head n // G.
        visible: who sees whom; a query that sees nothing gets zeros.
        scale: multiplies the scores (query_pre_attn_scalar ** -0.5).
        softcap: 50 in Gemma 2; None turns it off, which is an explicit choice for inference only.
        backend: a name from `BACKENDS`, or None for the best one here.

    Returns:
        [B, N, T, H] in q's dtype.

    Raises:
        UsageError: an unknown backend, or one that cannot do what is asked.
        CabochonError: the backend failed its proof on this device.
    """
    if backend is None and visible.in_order and cuda.usable(q, k, v, dense=False):
        from cabochon.model.kernels.cuda.attend import as_backend

        return as_backend(q, k, v, visible, scale, softcap)
    name = backend or choose(q, k, softcap)
    if name not in BACKENDS:
        raise UsageError(
            f"no attention backend named {name!r}",
            f"there are {', '.join(BACKENDS)}",
            f"did you mean {nearest(name, BACKENDS)!r}?",
        )
    if name == "sdpa":
        _refuse_sdpa(softcap, training=torch.is_grad_enabled() and q.requires_grad)
    if (name, q.device.type, q.dtype) not in _PROVED:
        prove(name, q.device.type, q.dtype)
    return BACKENDS[name](q, k, v, visible, scale, softcap)


def choose(q: Tensor, k: Tensor, softcap: float | None) -> str:
    """The fastest backend that is exact for these inputs."""
    if q.device.type == "cuda" and q.shape[2] > 1 and elementwise.learnt(q, k):
        return "flex"  # compiling it takes a while: worth it for training
    if softcap is None and not (torch.is_grad_enabled() and q.requires_grad):
        return "sdpa"
    # In float32 torch's tanh and exp are nearer to the references' by some last bits.
    whole = q.dtype is torch.bfloat16 and 1 < q.shape[2] == k.shape[2]
    if q.device.type == "cpu" and (whole or elementwise.learnt(q, k)) and usable(gradients=True) is not None:
        return "native"
    return "plain" if q.shape[2] <= BLOCK else "blockwise"


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """The formula, all scores at once: [B, N, T, S] in float32."""
    return _attend(q, k, v, visible.mask(), scale, softcap)


def blockwise(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """The formula for `BLOCK` queries at a time, over only the keys that some query of the block sees."""
    blocks = []
    # From the last block, which sees most keys, to the first: the allocator then reuses what it has freed, while
    # blocks that grow never fit the holes that smaller ones left (1.6 GiB instead of 0.25 at 8192 tokens of 2b).
    for start in reversed(range(0, q.shape[2], BLOCK)):
        end = min(start + BLOCK, q.shape[2])
        low, high = visible.key_range(start, end)
        part = (q[:, :, start:end], k[:, :, low:high], v[:, :, low:high])
        mask = visible.mask(slice(start, end), slice(low, high))
        if torch.is_grad_enabled() and q.requires_grad:  # keep no scores for the way back: make them again
            blocks.append(_recomputed(*part, mask, scale, softcap))
        else:
            blocks.append(_attend(*part, mask, scale, softcap))
    return torch.cat(blocks[::-1], dim=2)


def _recomputed(*inputs: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint  # takes a second to import, and only training needs it

    mixed: Tensor = checkpoint(_attend, *inputs, use_reentrant=False)
    return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q [B, N, T, H], k and v [B, K, S, H], mask bool [B, T, S] -> [B, N, T, H]."""
    (batch, heads, queries, size), (kv_heads, keys) = q.shape, k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, -1, size)  # [B, K, G * T, H]: no copy of the keys for each head
    scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, queries, keys).float()
    scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
    # The lowest finite number instead of -inf: a row with nothing to see stays finite and is zeroed below.
    scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(q.dtype).view(batch, kv_heads, -1, keys)
    mixed = (weights @ v).view(batch, heads, queries, size)
    return mixed * mask.any(-1)[:, None, :, None]


def native(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """As `blockwise`, keeping nothing but q, k and v for the way back. Only on a CPU, and where keys lie in runs."""
    runs = visible.runs if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) else None
    if runs is None:
        return blockwise(q, k, v, visible, scale, softcap)
    mixed: Tensor = training.Attention.apply(q, k, v, runs, scale, softcap or 0.0)  # type: ignore[no-untyped-call]
    return mixed


def flex(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """flex_attention: one fused kernel on CUDA; elsewhere its slow but equal eager form."""

    def cap(score: Tensor, *_indices: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    mixed: Tensor = _flex_kernel(q.device.type)(
        q, k, v, score_mod=cap, block_mask=visible.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed  # zeros where a query sees nothing


@cache
def _flex_kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    if device != "cuda":
        return kernel
    # Beyond the limit flex_attention would run uncompiled; the proof alone takes six. With shapes that are not fixed
    # its backward fails to compile (torch 2.11), so each shape is compiled for itself.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(kernel, dynamic=False)


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """torch's fused attention without a soft cap."""
    mask = visible.mask()[:, None]
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return torch.where(mask.any(-1, keepdim=True), mixed, 0)


def _refuse_sdpa(softcap: float | None, training: bool) -> None:
    if softcap is not None:
        raise UsageError(
            "the sdpa backend cannot compute Gemma 2 attention",
            f"it has no soft cap, and this model's is {softcap:g}",
            "leave the backend out, or turn the soft cap off with softcap=False, for inference only",
        )
    if training:
        raise UsageError(
            "attention without a soft cap cannot be trained",
            "a Gemma 2 model that is tuned without its soft cap is another model when it is used",
            "keep softcap=True",
        )


BACKENDS: dict[str, Backend] = {"plain": plain, "blockwise": blockwise, "native": native, "flex": flex, "sdpa": sdpa}


_PROVED: set[tuple[str, str, torch.dtype]] = set()


def prove(name: str, device: str, dtype: torch.dtype) -> None:
    """Let a backend show what it can on a device; raises `CabochonError` with what it got wrong."""
    if torch.compiler.is_compiling():  # as a decorator, `disable` would import the compiler for everyone: a second
        torch.compiler.disable(prove)(name, device, dtype)
        return
    wrong = failures(BACKENDS[name], device, dtype, with_softcap=name != "sdpa")
    if wrong:
        raise CabochonError(
            f"the attention backend {name!r} is refused on {device}",
            f"it differs from the float32 oracle in: {', '.join(wrong)}",
            "use another backend, and see `cabochon doctor`; answers from this one would be wrong",
        )
    _PROVED.add((name, device, dtype))
