"""The small steps between matrix products, each as one call of a kernel where there is one.

Every function says by its result whether it did the work; the caller holds the plain version. Where gradients are
asked for, `training.py` knows the way back.
"""

import torch
from torch import Tensor, empty_like

from cabochon.model.kernels import cuda, training
from cabochon.model.kernels.native import LANES, floats, usable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis D, in float32 up to the cast; None: not done.

    The result has x's dtype, or with gradients that of the product which follows under autocast.
    """
    if cuda.usable(x, weight):
        from cabochon.model.kernels.cuda import elementwise as kernels

        return kernels.rms_norm(x, weight, eps)
    native, size = usable(x, weight, gradients=True), x.shape[-1]
    if native is None or size % LANES:
        return None
    if learnt(x, weight):
        return training.RMSNorm.apply(x, weight, eps, None)  # type: ignore[no-any-return, no-untyped-call]
    out = empty_like(x)
    native.cabochon_rms_norm(floats(x), floats(weight), floats(out), x.numel() // size, size, eps)
    return out


def add_norm(base: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """base + rms_norm(x); None: not done. With gradients it is rounded once, else as the references do."""
    if cuda.usable(base, x, weight):
        from cabochon.model.kernels.cuda import elementwise as kernels

        return kernels.add_norm(base, x, weight, eps)
    if not learnt(base, x, weight) or x.shape[-1] % LANES or usable(base, x, weight, gradients=True) is None:
        return None
    return training.RMSNorm.apply(x, weight, eps, base)  # type: ignore[no-any-return, no-untyped-call]


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor | None:
    """The pairs (i, i + H/2) of x [B, T, heads, H] turned by angles float32 [B, T, 1, H/2]; None: not done.

    Without gradients x is reused.
    """
    if cuda.usable(x, cosine, sine):
        from cabochon.model.kernels.cuda import elementwise as kernels

        return kernels.rotated(x, cosine, sine)
    native, (_, _, heads, size) = usable(x, cosine, sine, gradients=True), x.shape
    if native is None or size % (2 * LANES):
        return None
    if learnt(x):
        return training.Rotate.apply(x, cosine, sine)  # type: ignore[no-any-return, no-untyped-call]
    rows = x.numel() // (heads * size)
    native.cabochon_rotate(floats(x), floats(x), cosine.data_ptr(), sine.data_ptr(), rows, heads, size)
    return x


def gelu_times(gate: Tensor, up: Tensor) -> Tensor | None:
    """gelu(gate) * up, the tanh form of GELU, in float32 up to the cast; None: not done."""
    if cuda.usable(gate, up):
        from cabochon.model.kernels.cuda import elementwise as kernels

        return kernels.gelu_times(gate, up)
    native = usable(gate, up, gradients=True)
    if native is None or gate.numel() % LANES:
        return None
    if learnt(gate, up):
        return training.GeluTimes.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]
    out = empty_like(gate)
    native.cabochon_gelu_times(floats(gate), floats(up), floats(out), gate.numel())
    return out


def learnt(*tensors: Tensor) -> bool:
    """Whether one of these gets a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
