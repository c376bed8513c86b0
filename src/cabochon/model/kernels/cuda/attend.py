"""Attention over pages of keys and values on a GPU: prompts and single tokens, cap and window inside.

A program takes some neighbouring queries of one sequence, with all the query heads that share a key-value head, and
goes over the keys that they see, with a running maximum (arXiv 2205.14135). Where that would leave processors without
work, several programs share the keys of the same queries, and a second kernel puts their parts together. How many
that are does not depend on how long the sequences are, so that a step can be replayed as a graph.

T queries, N query heads, K key-value heads, G = N / K, H head size, P positions of a page.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cabochon.base.errors import CabochonError
from cabochon.model.kernels.cuda import options
from cabochon.model.kernels.cuda.elementwise import tanh
from cabochon.model.proof import failures
from cabochon.model.visibility import Visibility

MOST_SPLITS = 32
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Blocks:
    """Which queries a program takes: int32 [blocks] each."""

    rows: Tensor  # the sequence, as a row of the page table
    tokens: Tensor  # the first query
    counts: Tensor
    most: int  # queries of a block
    longest: int  # keys that a query may see


def queries_together(group: int, dtype: torch.dtype) -> int:
    """Queries of a prompt that a program takes at once; float32 is for proofs, without tensor cores."""
    return max(1, (16 if dtype is torch.float32 else 128) // group)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    blocks: Blocks,
    positions: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Soft-capped attention of queries over their own sequence's pages: [T, N, H] in q's dtype.

    Args:
        q: [T, N, H], rotated; taken in the dtype of the keys.
        keys, values: [pages, K, P, H] of one layer.
        pages: int32 [sequences, blocks], the page of each block of P positions.
        blocks: every query in one of them; those of a block are neighbours at neighbouring positions.
        positions: int64 [T]; a query sees the positions up to its own, `window` of them at most; below 0 it sees none.

    Raises `CabochonError` when the kernel fails its proof on this device.
    """
    if (q.device, q.dtype, keys.dtype) not in _PROVED:
        prove(q.device, q.dtype, keys.dtype)
    (count, heads, size), kv_heads = q.shape, keys.shape[1]
    group, number = heads // kv_heads, len(blocks.rows)
    block_m = max(16, triton.next_power_of_2(group * blocks.most))
    splits = _splits(number * kv_heads, blocks, q.device)
    assert all(t.is_contiguous() for t in (q, keys, values, pages, blocks.rows, blocks.tokens, positions))
    out = torch.empty_like(q)
    parts = out if splits == 1 else torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
    peaks, sums = torch.empty(2, splits, count, heads, dtype=torch.float32, device=q.device)
    _attend[(number, kv_heads, splits)](
        q, keys, values, parts, peaks, sums, pages, blocks.rows, blocks.tokens, blocks.counts, positions,
        count, pages.shape[1], kv_heads, size, keys.shape[2], window or 0,
        scale if softcap is None else scale / softcap, LOG2_E if softcap is None else softcap * LOG2_E,
        WINDOW=window is not None, CAP=softcap is not None, SPLIT=splits > 1, GROUP=group,
        SIZE=max(16, triton.next_power_of_2(size)), BLOCK_M=block_m, BLOCK_S=32,
        PRECISION="ieee", num_stages=2, **options(q, warps=8 if block_m > 64 else 4),
    )  # fmt: skip
    if splits > 1:
        _combine[(count * heads,)](
            parts, peaks, sums, out, count * heads, size,
            SIZE=triton.next_power_of_2(size), SPLITS=splits, **options(q),
        )  # fmt: skip
    return out


def _splits(programs: int, blocks: Blocks, device: torch.device) -> int:
    """A power of two of programs for the same queries, if there are keys for them.

    Together two for each multiprocessor when each has a query or two; of prompts one, since a program fills it.
    """
    each, few = (2, 64) if blocks.most == 1 else (1, 512)  # few: keys that are not worth sharing
    wanted = min(triton.cdiv(each * _processors(device), programs), triton.cdiv(blocks.longest, few))
    return min(MOST_SPLITS, int(triton.next_power_of_2(wanted)))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["total_tokens"])
def _attend(
    q, keys, values, out, peaks, sums, table, rows, tokens, counts, positions,
    total_tokens, width, kv_heads, size, page, window, scale, cap,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, count = tl.load(tokens + block), tl.load(counts + block)
    first = tl.load(positions + token).to(tl.int32)
    table += tl.load(rows + block) * width
    t = tl.arange(0, BLOCK_M) // GROUP
    head = kv * GROUP + tl.arange(0, BLOCK_M) % GROUP
    h = tl.arange(0, SIZE)
    place = ((token + t) * kv_heads * GROUP + head).to(tl.int64)
    mine = (t < count)[:, None] & (h < size)[None]
    query = tl.load(q + place[:, None] * size + h[None], mask=mine, other=0.0).to(keys.dtype.element_ty)

    low = tl.maximum(0, first - window + 1) if WINDOW else 0
    high = first + count
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_S), tl.num_programs(2)) * BLOCK_S
    begin = low + split * share
    end = tl.minimum(begin + share, high)
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, SIZE], tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        there = s < end
        number = tl.load(table + s // page, mask=there, other=0).to(tl.int64)
        at = ((number * kv_heads + kv) * page + s % page) * size
        k = tl.load(keys + at[None] + h[:, None], mask=there[None] & (h < size)[:, None], other=0.0)
        scores = tl.dot(query, k, input_precision=PRECISION) * scale
        scores = (tanh(scores) if CAP else scores) * cap
        seen = there[None] & (s[None] <= (first + t)[:, None])
        if WINDOW:
            seen &= s[None] > (first + t - window)[:, None]
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        fall = tl.exp2(peak - higher)
        shares = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        weight = weight * fall + tl.sum(shares, 1)
        v = tl.load(values + at[:, None] + h[None], mask=there[:, None] & (h < size)[None], other=0.0)
        mixed = tl.dot(shares.to(v.dtype), v, mixed * fall[:, None], input_precision=PRECISION)
        peak = higher
    if SPLIT:
        entry = split.to(tl.int64) * total_tokens * kv_heads * GROUP + place
        tl.store(peaks + entry, peak, mask=t < count)
        tl.store(sums + entry, weight, mask=t < count)
        place = entry
    else:
        mixed = mixed / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out + place[:, None] * size + h[None], mixed.to(out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["entries"])
def _combine(parts, peaks, sums, out, entries, size, SIZE: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    entry = tl.program_id(0).to(tl.int64)
    where, h = tl.arange(0, SPLITS) * entries + entry, tl.arange(0, SIZE)
    peak = tl.load(peaks + where)
    factor = tl.exp2(peak - tl.max(peak))
    weight = tl.sum(tl.load(sums + where) * factor)
    part = tl.load(parts + where[:, None] * size + h[None], mask=(h < size)[None], other=0.0)
    mixed = tl.sum(part * factor[:, None], 0) / tl.where(weight > 0, weight, 1.0)
    tl.store(out + entry * size + h, mixed.to(out.dtype.element_ty), mask=h < size)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Put k and v [T, K, H] into keys and values [pages, K, P, H] at pages and offsets int64 [T]."""
    count, kv_heads, size = k.shape
    _store[(count, kv_heads)](
        k, v, keys, values, pages, offsets, kv_heads, keys.shape[2], size,
        SIZE=triton.next_power_of_2(size), **options(k, warps=1),
    )  # fmt: skip


@triton.jit
def _store(k, v, keys, values, pages, offsets, kv_heads, page, size, SIZE: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = tl.arange(0, SIZE)
    source = (token * tl.num_programs(1) + kv) * size + h
    number, offset = tl.load(pages + token), tl.load(offsets + token)
    target = ((number * kv_heads + kv) * page + offset) * size + h
    tl.store(keys + target, tl.load(k + source, mask=h < size).to(keys.dtype.element_ty), mask=h < size)
    tl.store(values + target, tl.load(v + source, mask=h < size).to(values.dtype.element_ty), mask=h < size)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor,
    keys: Tensor, values: Tensor, pages: Tensor, offsets: Tensor,
) -> None:  # fmt: skip
    """Turn q [T, N, H] in place by angles float32 [T * H/2], and store the turned k and v [T, K, H] as `store` does."""
    (count, heads, size), kv_heads = q.shape, k.shape[1]
    _rotate_and_store[(count, heads + 2 * kv_heads)](
        q, k, v, cosine, sine, keys, values, pages, offsets, heads, kv_heads, keys.shape[2], size // 2,
        HALF=triton.next_power_of_2(size // 2), **options(q, warps=1),
    )  # fmt: skip


@triton.jit
def _rotate_and_store(
    q, k, v, cosine, sine, keys, values, pages, offsets, heads, kv_heads, page, half,
    HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    inside = i < half
    kv = tl.maximum(head - heads, 0) % kv_heads
    target = ((tl.load(pages + token) * kv_heads + kv) * page + tl.load(offsets + token)) * 2 * half + i
    if head < heads + kv_heads:
        cos = tl.load(cosine + token * half + i, mask=inside)
        sin = tl.load(sine + token * half + i, mask=inside)
        source = tl.where(head < heads, q + (token * heads + head) * 2 * half, k + (token * kv_heads + kv) * 2 * half)
        a = tl.load(source + i, mask=inside).to(tl.float32)
        b = tl.load(source + half + i, mask=inside).to(tl.float32)
        first, second = (a * cos - b * sin).to(q.dtype.element_ty), (b * cos + a * sin).to(q.dtype.element_ty)
        if head < heads:
            tl.store(source + i, first, mask=inside)
            tl.store(source + half + i, second, mask=inside)
        else:
            tl.store(keys + target, first.to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + target + half, second.to(keys.dtype.element_ty), mask=inside)
    else:
        value = v + (token * kv_heads + kv) * 2 * half + i
        tl.store(values + target, tl.load(value, mask=inside).to(values.dtype.element_ty), mask=inside)
        tl.store(values + target + half, tl.load(value + half, mask=inside).to(values.dtype.element_ty), mask=inside)


_PROVED: set[tuple[torch.device, torch.dtype, torch.dtype]] = set()


def prove(device: torch.device, dtype: torch.dtype, kept: torch.dtype) -> None:
    """Let the kernel show that its cap, window and scale are real; raises `CabochonError` with what it got wrong."""
    _PROVED.add((device, dtype, kept))  # first, since the proof itself calls it
    wrong = failures(as_backend, device.type, kept, whole_texts_only=True)
    if wrong:
        _PROVED.discard((device, dtype, kept))
        raise CabochonError(
            f"the attention kernel is refused on {device}",
            f"it differs from the float32 oracle in: {', '.join(wrong)}",
            "install torch with the Triton that belongs to it; answers from this kernel would be wrong",
        )


def as_backend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float | None) -> Tensor:
    """The kernel with the arguments of `attention.py`, for texts whose key j lies at position j: one page for each."""
    batch, heads, count, size = q.shape
    most = queries_together(heads // k.shape[1], k.dtype)
    starts = torch.arange(0, count, most, device=q.device, dtype=torch.int32)
    texts = torch.arange(batch, device=q.device, dtype=torch.int32)[:, None]
    blocks = Blocks(
        texts.expand(-1, len(starts)).flatten().contiguous(),
        (texts * count + starts).flatten(),
        (count - starts).clamp_max(most).repeat(batch),
        min(most, count),
        k.shape[2],
    )
    flat = q.transpose(1, 2).reshape(batch * count, heads, size).contiguous()
    positions = visible.query_positions.flatten().contiguous()
    places = (k.contiguous(), v.contiguous(), texts, blocks, positions)
    mixed = attend(flat, *places, window=visible.window, scale=scale, softcap=softcap)
    return mixed.view(batch, count, heads, size).transpose(1, 2)
