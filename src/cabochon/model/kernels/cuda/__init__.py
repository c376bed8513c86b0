"""Kernels for CUDA, in Triton: what a step of a few tokens spends outside torch's own matrix products.

Triton comes with torch's builds for CUDA. Where it is missing, `usable` says no and torch computes the same, as it
does where a gradient is wanted. Nothing here imports Triton before a kernel is called.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DEVICES = {"cuda"}  # tests add "cpu", where Triton's interpreter runs the kernels
FLOATS = (torch.float32, torch.bfloat16)


@cache
def present() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def usable(*tensors: Tensor, dense: bool = True) -> bool:
    """Whether the kernels take these: float32 or bfloat16 on a GPU, where no gradient is asked for.

    With `dense` they have to lie in one piece.
    """
    if any(t.device.type not in DEVICES for t in tensors) or torch.is_grad_enabled() or not present():
        return False
    known = (t.dtype in FLOATS and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return all(known) and (not dense or all(t.is_contiguous() for t in tensors))


@cache
def early_start(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (from compute capability 9.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(x: Tensor, warps: int = 4) -> dict[str, Any]:
    """How a kernel on x's device is launched. Every kernel waits before it reads what others wrote, if it has to."""
    if early_start(x.device):
        return {"EARLY": True, "launch_pdl": True, "num_warps": warps}
    return {"EARLY": False, "num_warps": warps}
