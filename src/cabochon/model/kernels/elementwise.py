"""The small steps between matrix products, each as one call of a kernel where there is one.

Every function says by its result whether it did the work; the caller holds the plain version.
"""

from torch import Tensor, empty_like

from cabochon.model.kernels.native import LANES, floats, usable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis D, in float32 up to the cast; None: not done."""
    native, size = usable(x, weight), x.shape[-1]
    if native is None or size % LANES:
        return None
    out = empty_like(x)
    native.cabochon_rms_norm(floats(x), floats(weight), floats(out), x.numel() // size, size, eps)
    return out


def rotate_in_place(x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Turn the pairs (i, i + H/2) of x [B, T, heads, H] by angles float32 [B, T, 1, H/2]; False: not done."""
    native, (_, _, heads, size) = usable(x, cosine, sine), x.shape
    if native is None or size % (2 * LANES):
        return False
    rows = x.numel() // (heads * size)
    native.cabochon_rotate(floats(x), cosine.data_ptr(), sine.data_ptr(), rows, heads, size)
    return True


def gelu_times(gate: Tensor, up: Tensor) -> Tensor | None:
    """gelu(gate) * up, the tanh form of GELU, in float32 up to the cast; None: not done."""
    native = usable(gate, up)
    if native is None or gate.numel() % LANES:
        return None
    out = empty_like(gate)
    native.cabochon_gelu_times(floats(gate), floats(up), floats(out), gate.numel())
    return out
