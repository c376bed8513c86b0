"""A token drawn from its logits, as a call of the kernel in draw.c."""

import torch
from torch import Tensor

from cabochon.model.kernels.native import LANES, usable

_BLOCK = 1024  # as in draw.c


def draw(logits: Tensor, scale: float, share: float) -> int | None:
    """The first place of float32 logits [V] whose running sum of exp(scale logit) is above `share` of the whole.

    None: not done, or no logit is a number above -inf.
    """
    native, size = usable(logits, gradients=True), len(logits)
    if native is None or logits.dtype is not torch.float32 or size % LANES:
        return None
    sums = torch.empty(-(-size // _BLOCK), dtype=torch.float64)
    place = int(native.cabochon_draw(logits.data_ptr(), size, scale, share, sums.data_ptr()))
    return place if place >= 0 else None
