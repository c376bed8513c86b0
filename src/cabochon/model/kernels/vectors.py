"""What merges do with long vectors, each read once and on the thread that calls."""

from collections.abc import Sequence
from ctypes import byref, c_double, c_float

import torch
from torch import Tensor

from cabochon.model.kernels.native import Floats, floats, usable

MOST = 4  # vectors that the kernel takes at once


def inner_products(vectors: Sequence[Tensor]) -> list[float]:
    """v_i . v_j for j <= i, row by row: every product and sum in float64.

    Args:
        vectors: float [n], contiguous, of any types.
    """
    count = len(vectors)
    native = usable(*vectors, gradients=True) if count <= MOST else None
    if native is None:
        wide = [vector.double() for vector in vectors]
        return [torch.dot(a, b).item() for i, a in enumerate(wide) for b in wide[: i + 1]]
    found = (c_double * (count * (count + 1) // 2))()
    native.cabochon_inner_products((Floats * count)(*map(floats, vectors)), count, len(vectors[0]), found)
    return list(found)


def weighted_sum(
    tensors: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, bool]:
    """The sum [...] of factor times tensor, first to last, in float32, and whether the sum of that is a finite number.

    Args:
        tensors: float [...] of one shape, contiguous, of any types.
        dtype: float32 or bfloat16, to which the result is rounded.
    """
    native, (first, *others) = usable(*tensors, gradients=True), tensors
    if native is None:
        total = first.float() * factors[0]
        for tensor, factor in zip(others, factors[1:], strict=True):
            total.add_(tensor.float(), alpha=factor)
        return total.to(dtype), bool(torch.isfinite(total.sum()))
    count, total = len(tensors), torch.empty(first.shape, dtype=dtype)
    given = (Floats * count)(*map(floats, tensors)), (c_float * count)(*factors)
    return total, bool(native.cabochon_weighted_sum(*given, count, total.numel(), floats(total)))


def magnitudes(values: Tensor) -> float:
    """The sum of the magnitudes of a float tensor, contiguous, in float64."""
    native = usable(values, gradients=True)
    if native is None:
        return values.double().abs().sum().item()
    found = c_double()
    native.cabochon_magnitudes(floats(values), values.numel(), byref(found))
    return found.value


def kept_where(values: Tensor, bits: Tensor, below: int) -> Tensor:
    """float32 values [...], contiguous, where as many int16 bits lie below a limit, and 0 times them elsewhere.

    So what is not finite stays to be found.
    """
    native = usable(values, gradients=True) if values.dtype is torch.float32 else None
    if native is None:
        return values * (bits.view(values.shape).int() < below)
    out = torch.empty_like(values)
    native.cabochon_keep(values.data_ptr(), bits.data_ptr(), below, values.numel(), out.data_ptr())
    return out
