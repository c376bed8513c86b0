"""Two models: take from the second where it is near the first (nearswap), or where it matters (arcee_fusion)."""

from typing import Any

import torch
from torch import Tensor

from cabochon.merge.methods.blocks import Block, Whole
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.merge.methods.ranks import find, signed_keys

NEAREST = 1e-6  # mergekit's: differences below this count as this
EPSILON = 1e-8


def _nearswap(settings: Settings, _: Any) -> Apply:
    """Moves each element of the base by at most t towards the model: all the way where they differ by less."""
    t = settings.shared["t"]

    def apply(block: Block) -> Tensor:
        a, b = block.origin, block.tensors[0]
        share = torch.reciprocal((a - b).abs_().clamp_(min=NEAREST)).mul_(t).clamp_(0, 1)
        return share * b + (1 - share) * a

    return apply


def importance(block: Block) -> Tensor:
    """How much each element matters, float32 [r, C]: its change times the divergence of its row.

    The divergence is that of the softmax over the row in the model from that in the base.
    """
    p, q = (torch.softmax(values, dim=-1) + EPSILON for values in (block.tensors[0], block.origin))
    divergence = torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    return (block.tensors[0] - block.origin).abs() * divergence


def _threshold(whole: Whole, _: Settings) -> float:
    """Median plus 1.5 times the distance between the quartiles of all importances.

    Exact for any size. mergekit draws a million elements of larger tensors, without a seed.
    """
    last = whole.numel - 1
    ranks = [last // 4, last // 2, last * 3 // 4]
    first, median, third = (
        at.value for at in find(whole, lambda b: [signed_keys(importance(b))], [ranks], signed=True)[0]
    )
    return median + 1.5 * (third - first)


def _fusion(_: Settings, threshold: float) -> Apply:
    """The model's value where the importance reaches the threshold, the base's elsewhere.

    A product, so that a value that is not finite is found even where it is not chosen.
    """
    return lambda b: b.origin + (b.tensors[0] - b.origin) * (importance(b) >= threshold).float()


NEARSWAP = Method(
    "nearswap",
    "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    _nearswap,
    (Parameter("t"),),
    base="required",
    models=(1, 1),
)
ARCEE_FUSION = Method(
    "arcee_fusion", "https://arcee.ai, as in mergekit", _fusion, base="required", models=(1, 1), measure=_threshold
)
