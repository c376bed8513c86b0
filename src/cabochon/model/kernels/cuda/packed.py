"""Products of several rows with int8 and int4 matrices in the tiles of `model/linear.py`.

    few rows   weights become bfloat16 in registers, on their way from memory to the tensor cores
    many rows  the matrix is made bfloat16 first, a slice at a time: then arithmetic is what takes time

Whole numbers up to 8 bits are exact in bfloat16, so what is rounded is the activations, and the sums are float32.
M rows, N output channels, K input channels.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cabochon.model.kernels.cuda import options

TILE = 16
FEW = 64  # rows
SLICE = 2**26  # elements that are made bfloat16 at a time


class Packed(Protocol):
    """`PackedWeight` of `model/linear.py`."""

    weight: Tensor  # uint8 [tiles, 16 * K * bits / 8]
    scale: Tensor  # float32 [tiles, 16] or float16 [tiles, K / group, 16]
    zero: Tensor | None
    rows: int
    padded: int  # K in whole groups
    bits: int
    group: int


def product(x: Tensor, matrix: Packed) -> Tensor:
    """x [M, K padded], M > 1, times the transposed matrix: float32 [M, N]."""
    rounded = x.to(torch.bfloat16)
    return _few(rounded, matrix) if len(x) <= FEW else _many(rounded, matrix)


def _few(x: Tensor, matrix: Packed) -> Tensor:
    rows, tiles, four = len(x), len(matrix.weight), matrix.zero is not None
    block_m = max(16, triton.next_power_of_2(rows))
    # Tiles of a program: the more, the less often x is read. Measured on an H200 with the matrices of 2b and 9b.
    together, warps, wanted = (8, 8, 256) if block_m > 32 and not four else (4, 4, 900)
    programs = triton.cdiv(tiles, together)
    pieces = matrix.padded // (matrix.group if four else 128)
    splits = max(1, min(8, pieces // 7, wanted // programs))  # enough to keep every processor busy
    splits = 2 ** (splits.bit_length() - 1)
    out = torch.empty(splits, rows, matrix.rows, dtype=torch.float32, device=x.device)
    if not four:
        _few_int8[(programs, splits)](
            x, matrix.weight, matrix.scale, out, rows, matrix.rows, matrix.padded, tiles,
            BLOCK_M=block_m, TILES=together, BLOCK=32, num_stages=3, **options(x, warps),
        )  # fmt: skip
    else:
        _few_int4[(programs, splits)](
            x, matrix.weight, matrix.scale, matrix.zero, out, rows, matrix.rows, matrix.padded, tiles,
            BLOCK_M=block_m, TILES=together, GROUP=matrix.group, num_stages=4, **options(x, warps),
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


@triton.jit
def _stored(out, total, start, split, count, rows, BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr):
    """Put sums [channels, M] where they belong in out [splits, M, N]."""
    m, n = tl.arange(0, BLOCK_M)[None], start + tl.arange(0, CHANNELS)[:, None]
    tl.store(out + (split * count + m).to(tl.int64) * rows + n, total, mask=(m < count) & (n < rows))


@triton.jit(do_not_specialize=["count"])
def _few_int8(
    x, weight, scale, out, count, rows, size, tiles,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    first, split = tl.program_id(0) * TILES, tl.program_id(1)
    t, flat = (first + tl.arange(0, TILES))[:, None], tl.arange(0, BLOCK * 64)[None]
    place = weight + t.to(tl.int64) * 16 * size + flat
    k, m = tl.arange(0, BLOCK * 4)[:, None], tl.arange(0, BLOCK_M)[None]
    columns = size // 4
    share = tl.cdiv(tl.cdiv(columns, BLOCK), tl.num_programs(1)) * BLOCK
    total = tl.zeros([TILES * 16, BLOCK_M], tl.float32)
    for begin in range(split * share, min((split + 1) * share, columns), BLOCK):
        q = tl.load(place + begin * 64, mask=(t < tiles) & (begin * 64 + flat < 16 * size), other=0)
        w = tl.permute(tl.reshape(q, (TILES, BLOCK, 16, 4)), (0, 2, 1, 3))
        w = tl.reshape(w, (TILES * 16, BLOCK * 4))
        w = (w.to(tl.float32) - 128.0).to(tl.bfloat16)
        here = (m < count) & (begin * 4 + k < size)
        total = tl.dot(w, tl.load(x + m * size + begin * 4 + k, mask=here, other=0.0), total)
    n = first * 16 + tl.arange(0, TILES * 16)
    total *= tl.load(scale + n, mask=n < tiles * 16, other=0.0)[:, None]
    _stored(out, total, first * 16, split, count, rows, BLOCK_M, TILES * 16)


@triton.jit(do_not_specialize=["count"])
def _few_int4(
    x, weight, scale, zero, out, count, rows, size, tiles,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    first, split = tl.program_id(0) * TILES, tl.program_id(1)
    t = (first + tl.arange(0, TILES))[:, None]
    place = weight + t.to(tl.int64) * 8 * size + tl.arange(0, GROUP * 8)[None]
    k, m = tl.arange(0, GROUP // 2)[:, None], tl.arange(0, BLOCK_M)[None]
    n = tl.arange(0, TILES * 16)
    groups = size // GROUP
    of_group = (first + n // 16).to(tl.int64) * 16 * groups + n % 16
    share = tl.cdiv(groups, tl.num_programs(1))
    total = tl.zeros([TILES * 16, BLOCK_M], tl.float32)
    for g in range(split * share, min((split + 1) * share, groups)):
        q = tl.load(place + g * GROUP * 8, mask=t < tiles, other=0)
        q = tl.permute(tl.reshape(q, (TILES, GROUP // 8, 16, 4)), (0, 2, 1, 3))
        q = tl.reshape(q, (TILES * 16, GROUP // 2))
        factor = tl.load(scale + of_group + g * 16, mask=first + n // 16 < tiles, other=0.0).to(tl.float32)
        middle = tl.load(zero + of_group + g * 16, mask=first + n // 16 < tiles, other=0).to(tl.float32)[:, None]
        low, high = (q & 15).to(tl.float32) - middle, (q >> 4).to(tl.float32) - middle
        at = x + m * size + g * GROUP + k // 4 * 8 + k % 4
        part = tl.dot(low.to(tl.bfloat16), tl.load(at, mask=m < count, other=0.0))
        part = tl.dot(high.to(tl.bfloat16), tl.load(at + 4, mask=m < count, other=0.0), part)
        total += part * factor[:, None]
    _stored(out, total, first * 16, split, count, rows, BLOCK_M, TILES * 16)


def _many(x: Tensor, matrix: Packed) -> Tensor:
    step, parts = max(1, SLICE // (TILE * matrix.padded)), []
    for first in range(0, len(matrix.weight), step):
        rows = min(step * TILE, matrix.rows - first * TILE)
        weight = unpacked(matrix, torch.bfloat16, first, rows, scaled=matrix.zero is not None).T
        parts.append(torch.mm(x, weight, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float())
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out if matrix.zero is not None else out.mul_(matrix.scale.flatten()[: matrix.rows])


def unpacked(matrix: Packed, dtype: torch.dtype, first: int, rows: int, *, scaled: bool = True) -> Tensor:
    """Rows of a matrix from a tile on as floats, [rows, K padded]; int8 also without its scales: whole numbers."""
    out = torch.empty(rows, matrix.padded, dtype=dtype, device=matrix.weight.device)
    four, block = matrix.zero is not None, 128
    grid = (triton.cdiv(rows, TILE), triton.cdiv(matrix.padded // (8 if four else 4), block))
    zero = matrix.weight if matrix.zero is None else matrix.zero
    _unpack[grid](
        matrix.weight.view(torch.int32), matrix.scale, zero, out, first, rows, matrix.padded,
        FOUR=four, SCALED=scaled, GROUP=matrix.group, BLOCK=block, **options(out),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first", "rows"])
def _unpack(
    weight, scale, zero, out, first, rows, size,
    FOUR: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    kind = out.dtype.element_ty
    tile, lane = (first + tl.program_id(0)).to(tl.int64), tl.arange(0, 16)[None]
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]  # words of 8 or 4 input channels
    word = tl.load(weight + tile * (2 if FOUR else 4) * size + i * 16 + lane, mask=i < size // (8 if FOUR else 4))
    n = (tl.program_id(0) * 16 + lane).to(tl.int64)[:, :, None]
    if FOUR:
        at = (tile * (size // GROUP) + i * 8 // GROUP) * 16 + lane
        factor = tl.load(scale + at, mask=i < size // 8, other=0.0).to(tl.float32)
        middle = tl.load(zero + at, mask=i < size // 8, other=0).to(tl.float32)
        even = tl.join(_four(word, 0, middle, factor), _four(word, 2, middle, factor))
        value = tl.join(even, tl.join(_four(word, 1, middle, factor), _four(word, 3, middle, factor)))
        column = i[:, :, None] * 8 + tl.arange(0, 8)[None, None]
        value = tl.reshape(value, (BLOCK, 16, 8))
    else:
        factor = tl.load(scale + tile * 16 + lane) if SCALED else 1.0
        value = tl.join(_two(word, 0, factor), _two(word, 1, factor))
        column = i[:, :, None] * 4 + tl.arange(0, 4)[None, None]
        value = tl.reshape(value, (BLOCK, 16, 4))
    tl.store(out + n * size + column, value.to(kind), mask=(n < rows) & (column < size))


@triton.jit
def _four(word, j: tl.constexpr, middle, factor):
    """Input channels j and j + 4 of a word of eight: side by side in its bytes."""
    low, high = ((word >> 8 * j) & 15).to(tl.float32), ((word >> 8 * j + 4) & 15).to(tl.float32)
    return tl.join((low - middle) * factor, (high - middle) * factor)


@triton.jit
def _two(word, j: tl.constexpr, factor):
    """Input channels j and j + 2 of a word of four."""
    first, second = ((word >> 8 * j) & 255).to(tl.float32), ((word >> 8 * j + 16) & 255).to(tl.float32)
    return tl.join((first - 128.0) * factor, (second - 128.0) * factor)
