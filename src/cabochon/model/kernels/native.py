"""The compiled kernels, through ctypes: which there are, whether this processor runs them, and how they are called.

The library is plain C, built when the package is installed (`[tool.setuptools]` in pyproject.toml). It needs no header
of Python or torch, so it works with any version of either. Its loops run on the OpenMP threads that torch has
already started, because it is loaded after torch and takes those symbols from it: two pools on the same cores would
fight. Without a compiler, or on another processor, `library()` is None and the plain twins compute instead.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

NAME = "_native"
LANES = 16  # float32 numbers in a register; kernels.h has the same


class Floats(ctypes.Structure):
    """An array of float32 or bfloat16, as kernels.h declares it."""

    _fields_ = (("data", ctypes.c_void_p), ("is_bf16", ctypes.c_int64))


_I, _P, _F, _D = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_double
_SIGNATURES = {  # what each function takes, as declared in the .c files
    "cabochon_supported": (),
    "cabochon_qlinear": (_P, _I, Floats, _I, _P),
    "cabochon_dequantize": (_P, Floats, _I, _I, _I),
    "cabochon_bf16_linear": (Floats, _P, Floats, _I, _I, _I),
    "cabochon_has_bf16": (),
    "cabochon_lossless_linear": (_P, _P, Floats, _I),
    "cabochon_lossless_unpack": (_P, _P, _I, _P),
    "cabochon_lossless_pack": (_P, _P, _P, _P, _I, _I),
    "cabochon_lossless_exceptions": (_P, _P, _P, _P, _P, _I, _I),
    "cabochon_rms_norm": (Floats, Floats, Floats, _I, _I, _F),
    "cabochon_rotate": (Floats, Floats, _P, _P, _I, _I, _I),
    "cabochon_gelu_times": (Floats, Floats, Floats, _I),
    "cabochon_attend": (_P,),
    "cabochon_add_norm": (Floats, Floats, Floats, Floats, _I, _I, _F),
    "cabochon_norm_backward": (Floats, Floats, Floats, Floats, _P, _I, _I, _F, _I),
    "cabochon_gelu_times_backward": (Floats, Floats, Floats, Floats, Floats, _I),
    "cabochon_scores": (_P,),
    "cabochon_scores_backward": (_P,),
    "cabochon_log_normaliser": (Floats, _P, _I, _I, _F, _F),
    "cabochon_softmax_gradient": (Floats, _P, _P, _P, _I, _I, _F, _F),
    "cabochon_divergence": (_P,),
    "cabochon_compare": (_P,),
    "cabochon_draw": (_P, _I, _F, _D, _P),
    "cabochon_inner_products": (_P, _I, _I, _P),
    "cabochon_weighted_sum": (_P, _P, _I, _I, Floats),
    "cabochon_magnitudes": (Floats, _I, _P),
    "cabochon_keep": (_P, _P, _I, _I, _P),
    "cabochon_add": (_P, Floats, _I),
    "cabochon_large_pages": (_P, _I),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None with the reason in `why_not`."""
    return _open()[0]


def why_not() -> str:
    """Why the plain twins compute on this machine; empty when the kernels do."""
    return _open()[1]


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(NAME + suffix)).exists()]
    if not found:
        return None, "they were not compiled: no C compiler was there when cabochon was installed"
    # torch's own OpenMP, made visible to what is loaded after it.
    deps = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    try:
        if deps.exists():
            ctypes.CDLL(str(deps), mode=ctypes.RTLD_GLOBAL)
        opened = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"they could not be loaded: {error}"
    for name, arguments in _SIGNATURES.items():
        try:
            getattr(opened, name).argtypes = arguments
        except AttributeError:
            return None, "they were compiled from older sources: install cabochon again"
    if not opened.cabochon_supported():
        return None, "this processor lacks AVX512-VNNI"
    return opened, ""


def usable(*tensors: Tensor, gradients: bool = False) -> ctypes.CDLL | None:
    """The kernels when every tensor is a dense float32 or bfloat16 CPU tensor and no gradient is asked for.

    With `gradients` they may be: the caller sees to the way back.
    """
    opened = library()
    if opened is None or (torch.is_grad_enabled() and not gradients):
        return None
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):  # what is spread over devices has no memory of its own
            return None
        known = tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16
        if not known or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
    return opened


def floats(tensor: Tensor) -> Floats:
    """A tensor as the kernels take it; it has to outlive the call."""
    return Floats(tensor.data_ptr(), tensor.dtype is torch.bfloat16)
