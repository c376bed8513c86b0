"""The small steps between matrix products, each one kernel: the CUDA side of `kernels/elementwise.py`.

Numbers are rounded where the plain formulas round them: in float32 up to the cast to the dtype of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cabochon.model.kernels.cuda import options

BLOCK = 1024  # elements of one program where every element is for itself


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis D."""
    out = torch.empty_like(x)
    _launch_norm(x, weight, x, weight, out, out, eps, add=False, again=False)
    return out


def add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x + norm(update)."""
    out = torch.empty_like(x)
    _launch_norm(update, weight, x, weight, out, out, eps, add=True, again=False)
    return out


def add_norm_norm(x: Tensor, update: Tensor, weight: Tensor, following: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + norm(update), and the norm of s by the weight of the following norm."""
    out, normed = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(update, weight, x, following, out, normed, eps, add=True, again=True)
    return out, normed


def _launch_norm(
    x: Tensor, weight: Tensor, base: Tensor, following: Tensor, out: Tensor, normed: Tensor, eps: float,
    *, add: bool, again: bool,
) -> None:  # fmt: skip
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    launch = options(x, warps=max(1, min(8, block // 256)))
    _norm[(x.numel() // size,)](
        x, weight, base, following, out, normed, size, eps, ADD=add, AGAIN=again, BLOCK=block, **launch
    )


@triton.jit
def _norm(
    x, weight, base, following, out, normed, size, eps,
    ADD: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    i = tl.arange(0, BLOCK)
    inside = i < size
    factor = 1.0 + tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * size + i
    if EARLY:
        gdc_wait()
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / size + eps) * factor
    value = value.to(out.dtype.element_ty)
    if ADD:
        value = (tl.load(base + at, mask=inside, other=0.0).to(tl.float32) + value.to(tl.float32)).to(value.dtype)
    tl.store(out + at, value, mask=inside)
    if AGAIN:
        value = value.to(tl.float32)
        factor = 1.0 + tl.load(following + i, mask=inside, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value) / size + eps) * factor
        tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The pairs (i, i + H/2) of x [B, T, heads, H] turned in place by angles float32 [B, T, 1, H/2]."""
    batch, length, heads, size = x.shape
    half = size // 2
    _rotate[(batch * length, heads)](x, cosine, sine, half, BLOCK=triton.next_power_of_2(half), **options(x, warps=1))
    return x


@triton.jit
def _rotate(x, cosine, sine, half, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = i < half
    cos = tl.load(cosine + token * half + i, mask=inside)
    sin = tl.load(sine + token * half + i, mask=inside)
    where = x + (token * tl.num_programs(1) + tl.program_id(1)) * 2 * half + i
    first = tl.load(where, mask=inside).to(tl.float32)
    second = tl.load(where + half, mask=inside).to(tl.float32)
    tl.store(where, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(where + half, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


def gelu_times(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, the tanh form of GELU."""
    out = torch.empty_like(gate)
    count = gate.numel()
    _gelu_times[(triton.cdiv(count, BLOCK),)](gate, up, out, count, BLOCK=BLOCK, **options(gate))
    return out


@triton.jit
def gelu(x):
    """The tanh form, in float32."""
    # 1 / (1 + exp(-2u)) is (1 + tanh(u)) / 2
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gelu_times(gate, up, out, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = gelu(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32))
    value = value.to(out.dtype.element_ty).to(tl.float32) * tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """float32 cap * tanh(x / cap); as they are without a cap."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    count = x.numel()
    _capped[(triton.cdiv(count, BLOCK),)](x, out, count, cap or 1.0, CAP=cap is not None, BLOCK=BLOCK, **options(x))
    return out


@triton.jit
def tanh(x):
    """Exact to the last bits of float32 where |x| is not small, and to 1e-7 where it is."""
    fall = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - fall) / (1.0 + fall)
    return tl.where(x < 0, -size, size)


@triton.jit
def _capped(x, out, count, cap, CAP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    if CAP:
        value = tanh(value / cap) * cap
    tl.store(out + i, value, mask=i < count)
