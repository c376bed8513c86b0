"""Products of a single row with large matrices, at the speed of memory: the step of one stream.

Up to three matrices side by side are one kernel (queries, keys and values), and so are gate and up with the GELU
between them. What a program needs of the weights it asks for before it waits for the row: where kernels may start
early, memory never rests.

    float  every program takes a few rows of the matrix as they lie
    int8   tiles of 16 channels as `model/linear.py` packs them: [K / 4, 16, 4], whole numbers plus 128
    int4   the same as [K / 8, 16, 4]: of 8 input channels the first four in the low half of the bytes

N output channels, K input channels. The row is not rounded; sums are in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cabochon.model.kernels.cuda import options
from cabochon.model.kernels.cuda.elementwise import gelu
from cabochon.model.kernels.cuda.packed import Packed

TILE = 16


@dataclass(frozen=True)
class Shape:
    """What a program takes at a time: so many rows of the matrix, so many numbers of each, by so many warps."""

    rows: int
    columns: int
    warps: int


def shape(columns: int, *, gated: bool = False) -> Shape:
    """Rows whole as long as registers hold them; measured on an H200 with the matrices of 2b and 9b."""
    whole = min(triton.next_power_of_2(columns), 16_384)
    if whole > 4096:
        return Shape(1, whole, 8)
    return Shape(4, whole, 8) if whole == 4096 and not gated else Shape(2, whole, 4)


def float_row(x: Tensor, matrices: Sequence[Tensor], *, gated: bool = False, by: Shape | None = None) -> Tensor:
    """x [K] times up to three transposed matrices [N, K]: [sum of N]; `gated`: gelu of the first times the second."""
    sizes = [len(m) for m in matrices]
    out = x.new_empty(sizes[0] if gated else sum(sizes))
    columns = x.numel()
    by = by or shape(columns, gated=gated)
    first, second, third = (*matrices, matrices[0], matrices[0])[:3]
    n = (*sizes, 0, 0)[:3]
    programs = triton.cdiv(n[0], by.rows) if gated else sum(triton.cdiv(size, by.rows) for size in n)
    _float_row[(programs,)](
        x, first, second, third, out, *n, columns,
        GATED=gated, LONG=columns > by.columns, BLOCK_N=by.rows, BLOCK_K=by.columns, **options(x, by.warps),
    )  # fmt: skip
    return out


@triton.jit
def _which(program, per, n1, n2, n3):
    """Of which matrix a program computes rows, from which row on, how many there are, and where they go."""
    p1, p2 = tl.cdiv(n1, per), tl.cdiv(n2, per)
    in_first, in_third = program < p1, program >= p1 + p2
    start = tl.where(in_first, program, tl.where(in_third, program - p1 - p2, program - p1)) * per
    rows = tl.where(in_first, n1, tl.where(in_third, n3, n2))
    base = tl.where(in_first, 0, tl.where(in_third, n1 + n2, n1))
    return in_first, in_third, start, rows, base


@triton.jit
def _float_row(
    x, first, second, third, out, n1, n2, n3, size,
    GATED: tl.constexpr, LONG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    if GATED:
        matrix, start, rows, base = first, tl.program_id(0) * BLOCK_N, n1, 0
    else:
        in_first, in_third, start, rows, base = _which(tl.program_id(0), BLOCK_N, n1, n2, n3)
        matrix = tl.where(in_first, first, tl.where(in_third, third, second))
    n = start + tl.arange(0, BLOCK_N)
    total, ups = _float_sums(x, matrix, second, start, rows, size, GATED, LONG, BLOCK_N, BLOCK_K, EARLY)
    total = total.to(out.dtype.element_ty)
    if GATED:
        total = gelu(total.to(tl.float32)).to(out.dtype.element_ty).to(tl.float32)
        total = (total * ups.to(out.dtype.element_ty).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + base + n, total, mask=n < rows)


@triton.jit
def _float_sums(
    x, matrix, other, start, rows, size,
    BOTH: tl.constexpr, LONG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x times some rows of a matrix, or of two: float32 [BLOCK_N] twice. Of long rows the next piece is asked ahead."""
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    first = start.to(tl.int64) * size
    at = n[:, None] * size + k[None]
    inside = (start + n < rows)[:, None]
    now = tl.load(matrix + first + at, mask=inside & (k < size)[None], other=0.0, eviction_policy="evict_first")
    if BOTH:
        also = tl.load(other + first + at, mask=inside & (k < size)[None], other=0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    if not LONG:
        row = tl.load(x + k, mask=k < size, other=0.0).to(tl.float32)[None]
        sums = tl.sum(now.to(tl.float32) * row, 1)
        return sums, tl.sum(also.to(tl.float32) * row, 1) if BOTH else sums
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    more = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, size, BLOCK_K):
        ahead = begin + BLOCK_K
        left = inside & (ahead + k < size)[None]
        row = tl.load(x + begin + k, mask=begin + k < size, other=0.0).to(tl.float32)[None]
        later = tl.load(matrix + first + ahead + at, mask=left, other=0.0, eviction_policy="evict_first")
        total += now.to(tl.float32) * row
        now = later
        if BOTH:
            later = tl.load(other + first + ahead + at, mask=left, other=0.0, eviction_policy="evict_first")
            more += also.to(tl.float32) * row
            also = later
    return tl.sum(total, 1), tl.sum(more, 1)


def packed_row(x: Tensor, matrices: Sequence[Packed], *, gated: bool = False) -> Tensor:
    """As `float_row` for packed matrices of one kind; x [K padded]."""
    sizes = [m.rows for m in matrices]
    out = x.new_empty(sizes[0] if gated else sum(sizes))
    first, second, third = (*matrices, matrices[0], matrices[0])[:3]
    n = (*sizes, 0, 0)[:3]
    programs = triton.cdiv(n[0], TILE) if gated else sum(triton.cdiv(size, TILE) for size in n)
    block, warps = _packed_shape(programs, first.bits)
    if first.bits == 8:
        tensors = [t for m in (first, second, third) for t in (m.weight.view(torch.int32), m.scale)]
        _int8_row[(programs,)](x, *tensors, out, *n, first.padded, GATED=gated, BLOCK=block, **options(x, warps))
    else:
        parts = (t for m in (first, second, third) for t in (m.weight.view(torch.int32), m.scale, m.zero))
        tensors = [t for t in parts if t is not None]
        _int4_row[(programs,)](
            x, *tensors, out, *n, first.padded,
            GATED=gated, GROUP=first.group, BLOCK=block, **options(x, warps),
        )  # fmt: skip
    return out


def _packed_shape(programs: int, bits: int) -> tuple[int, int]:
    """Words of a channel that a program takes at a time, and its warps: the fewer programs, the more has each to ask
    for at once. Measured on an H200 with the matrices of 2b and 9b."""
    if programs <= 256:
        return 256, 8
    return (128, 8 if bits == 8 else 4) if programs < 4096 else (64, 4)


@triton.jit
def _int8_tile(x, weight, scale, tile, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row times 16 channels: float32 [16]. A word holds four input channels; words are asked for a block ahead."""
    total = tl.zeros([BLOCK, 16], tl.float32)
    i, lane = tl.arange(0, BLOCK), tl.arange(0, 16)
    words = size // 4
    at = weight + tile.to(tl.int64) * 4 * size + i[:, None] * 16 + lane[None]
    now = tl.load(at, mask=(i < words)[:, None], other=0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    for begin in range(0, words, BLOCK):
        ahead = begin + BLOCK
        later = tl.load(at + ahead * 16, mask=(ahead + i < words)[:, None], other=0, eviction_policy="evict_first")
        row_sum = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(4):
            part = tl.load(x + (begin + i) * 4 + j, mask=begin + i < words, other=0.0).to(tl.float32)
            total += ((now >> 8 * j) & 255).to(tl.float32) * part[:, None]
            row_sum += part
        total -= 128.0 * row_sum[:, None]
        now = later
    return tl.sum(total, 0) * tl.load(scale + tile * 16 + lane)


@triton.jit
def _int8_row(
    x, w1, s1, w2, s2, w3, s3, out, n1, n2, n3, size, GATED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    lane = tl.arange(0, 16)
    if GATED:
        tile, rows, base = tl.program_id(0), n1, 0
        total = gelu(_int8_tile(x, w1, s1, tile, size, BLOCK, EARLY)) * _int8_tile(x, w2, s2, tile, size, BLOCK, EARLY)
    else:
        in_first, in_third, start, rows, base = _which(tl.program_id(0), 16, n1, n2, n3)
        weight = tl.where(in_first, w1, tl.where(in_third, w3, w2))
        scale = tl.where(in_first, s1, tl.where(in_third, s3, s2))
        tile = start // 16
        total = _int8_tile(x, weight, scale, tile, size, BLOCK, EARLY)
    n = tile * 16 + lane
    tl.store(out + base + n, total.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _int4_tile(
    x, weight, scale, zero, tile, size, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """The same in 4 bits, a block ahead: a word holds eight input channels, in the order 0, 4, 1, 5, 2, 6, 3, 7."""
    total = tl.zeros([BLOCK, 16], tl.float32)
    i, lane = tl.arange(0, BLOCK), tl.arange(0, 16)
    words = size // 8
    at = weight + tile.to(tl.int64) * 2 * size + i[:, None] * 16 + lane[None]
    table = tile.to(tl.int64) * (16 * size // GROUP) + lane[None]
    now = tl.load(at, mask=(i < words)[:, None], other=0, eviction_policy="evict_first")
    group = table + (i // (GROUP // 8) * 16)[:, None]
    factor = tl.load(scale + group, mask=(i < words)[:, None], other=0.0)
    middle = tl.load(zero + group, mask=(i < words)[:, None], other=0)
    if EARLY:
        gdc_wait()
    for begin in range(0, words, BLOCK):
        ahead = begin + BLOCK
        there = (ahead + i < words)[:, None]
        later = tl.load(at + ahead * 16, mask=there, other=0, eviction_policy="evict_first")
        group = table + ((ahead + i) // (GROUP // 8) * 16)[:, None]
        later_factor = tl.load(scale + group, mask=there, other=0.0)
        later_middle = tl.load(zero + group, mask=there, other=0)
        sums, row_sum = tl.zeros([BLOCK, 16], tl.float32), tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(8):
            channel = (begin + i) * 8 + j // 2 + j % 2 * 4
            part = tl.load(x + channel, mask=begin + i < words, other=0.0).to(tl.float32)
            if j < 7:  # left where it is: a power of 16 too large
                sums += (now & (15 << 4 * j)).to(tl.float32) * (part * 16.0**-j)[:, None]
            else:
                sums += ((now >> 28) & 15).to(tl.float32) * part[:, None]
            row_sum += part
        total += (sums - middle.to(tl.float32) * row_sum[:, None]) * factor.to(tl.float32)
        now, factor, middle = later, later_factor, later_middle
    return tl.sum(total, 0)


@triton.jit
def _int4_row(
    x, w1, s1, z1, w2, s2, z2, w3, s3, z3, out, n1, n2, n3, size,
    GATED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    lane = tl.arange(0, 16)
    if GATED:
        tile, rows, base = tl.program_id(0), n1, 0
        ups = _int4_tile(x, w2, s2, z2, tile, size, GROUP, BLOCK, EARLY)
        total = gelu(_int4_tile(x, w1, s1, z1, tile, size, GROUP, BLOCK, EARLY)) * ups
    else:
        in_first, in_third, start, rows, base = _which(tl.program_id(0), 16, n1, n2, n3)
        weight = tl.where(in_first, w1, tl.where(in_third, w3, w2))
        scale = tl.where(in_first, s1, tl.where(in_third, s3, s2))
        zero = tl.where(in_first, z1, tl.where(in_third, z3, z2))
        tile = start // 16
        total = _int4_tile(x, weight, scale, zero, tile, size, GROUP, BLOCK, EARLY)
    n = tile * 16 + lane
    tl.store(out + base + n, total.to(out.dtype.element_ty), mask=n < rows)
