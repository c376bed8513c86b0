"""What head losses do to a chunk of raw logits [C, V] between its products, as calls of the kernels in losses.c.

Every function says by its result whether it did the work; the caller holds the plain version. Logits are float32 or
bfloat16; everything of a row is float32 [C].
"""

import ctypes

import torch
from torch import Tensor

from cabochon.model.kernels.native import LANES, Floats, floats, library, usable

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")  # numbered as in losses.c


class _Divergence(ctypes.Structure):
    _fields_ = (
        ("student", Floats),
        ("teacher", Floats),
        ("weight", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("c", ctypes.c_int64),
        ("v", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("beta", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("student_cap", ctypes.c_float),
        ("teacher_cap", ctypes.c_float),
    )


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("ours", Floats),
        ("theirs", Floats),
        ("target", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("c", ctypes.c_int64),
        ("v", ctypes.c_int64),
        ("cap", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


def log_normaliser(raw: Tensor, soft_cap: float | None, temperature: float) -> Tensor | None:
    """log of the sum of exp(z) over each row, after soft cap and temperature; None: not done."""
    native, (rows, size) = usable(raw), raw.shape
    if native is None or size % LANES:
        return None
    out = raw.new_empty(rows, dtype=torch.float32)
    native.cabochon_log_normaliser(floats(raw), out.data_ptr(), rows, size, soft_cap or 0.0, 1 / temperature)
    return out


def softmax_gradient_in_place(
    raw: Tensor, soft_cap: float | None, temperature: float, normaliser: Tensor, multiple: Tensor, constant: Tensor
) -> bool:
    """raw becomes (multiple * exp(z - normaliser) + constant) dz/draw; False: not done."""
    native, (rows, size) = usable(raw, normaliser, multiple, constant), raw.shape
    if native is None or size % LANES:
        return False
    parts = [part.float() for part in (normaliser, multiple, constant)]
    addresses = [part.data_ptr() for part in parts]
    native.cabochon_softmax_gradient(floats(raw), *addresses, rows, size, soft_cap or 0.0, 1 / temperature)
    return True


def add_in_place(total: Tensor, part: Tensor) -> bool:
    """float32 total += part of the same shape; False: not done. torch converts part to a copy first."""
    native = usable(total, part)
    if native is None or total.dtype is not torch.float32 or total.numel() % LANES:
        return False
    native.cabochon_add(total.data_ptr(), floats(part), total.numel())
    return True


def large(new: Tensor) -> Tensor:
    """A tensor just made and not yet written, its memory to come in large pages where the system has them.

    Some hundred MB that are new at every step otherwise cost a fault for each 4 kB: a twentieth of the step.
    """
    native = library()
    if native is not None and new.device.type == "cpu":
        native.cabochon_large_pages(new.data_ptr(), new.numel() * new.itemsize)
    return new


def divergence_in_place(
    raw: Tensor,
    teacher_raw: Tensor,
    weights: Tensor,
    kind: tuple[str, float],
    soft_caps: tuple[float | None, float | None],
    temperature: float,
) -> Tensor | None:
    """Values of a divergence times weights; raw becomes their gradient. None: not done.

    Args:
        kind: a name of `DIVERGENCES`, and beta for Jensen-Shannon, above 0 and below 1.
        soft_caps: of the student and of the teacher.
    """
    native, (rows, size) = usable(raw, teacher_raw, weights), raw.shape
    if native is None or size % LANES:
        return None
    weights = weights.float()
    values, caps = weights.new_empty(rows), [cap or 0.0 for cap in soft_caps]
    problem = _Divergence(
        floats(raw), floats(teacher_raw), weights.data_ptr(), values.data_ptr(),
        rows, size, DIVERGENCES.index(kind[0]), kind[1], 1 / temperature, *caps,
    )  # fmt: skip
    native.cabochon_divergence(ctypes.addressof(problem))
    return values


def compared(raw: Tensor, other: Tensor, targets: Tensor, soft_cap: float | None, temperature: float) -> Tensor | None:
    """float32 [4, C]: log-probabilities of targets int64 [C] by both, entropy of the first, its KL from the other.

    None: not done.
    """
    native, (rows, size) = usable(raw, other), raw.shape
    if native is None or size % LANES:
        return None
    out, targets = raw.new_empty(4, rows, dtype=torch.float32), targets.contiguous()
    call = _Comparison(
        floats(raw), floats(other), targets.data_ptr(), out.data_ptr(), rows, size, soft_cap or 0.0, 1 / temperature
    )
    native.cabochon_compare(ctypes.addressof(call))
    return out
