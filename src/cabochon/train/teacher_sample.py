"""From a teacher's logits to the few entries that are stored of them, and what that costs.

    top-k     the k likeliest ids. All others are one bucket; what is lost is how they differ from each other.
    sampled   k ids whose weights are the teacher's distribution in expectation, so that the gradient of the forward KL
              is unbiased (random sampling distillation, arXiv 2503.16870).

How ids are sampled. Let t be the threshold at which the sum of min(1, p / t) over all ids is k. Ids above t are kept
and weigh p; each other one is drawn with probability p / t and weighs t. Of all unbiased choices of k weights this has
the least variance (Fearnhead and Clifford, J. R. Stat. Soc. B 65, 2003). Against k draws with replacement
no id takes two entries and the likely ones have no variance at all, so it is the only kind of sample that is made here.
Drawn ones are found with one uniform number u: the ids below t in line, each as long as it is likely, are cut at
u t, (u + 1) t, (u + 2) t, ... The weights of a position add up to exactly 1, and need no room: they are max(p, t).

Dimension letters: M positions, C positions at a time, V vocabulary, k entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.base.errors import BadInput
from cabochon.data.teacher_format import Said
from cabochon.data.teacher_index import Totals

AT_ONCE = 2**23  # probabilities held in several copies at once
BLOCK = 512  # ids, when one is looked for


@dataclass(frozen=True)
class _Part:
    """ids int64 [C, k], probabilities float32 [C, k], last float64 [C]; sums over the part."""

    ids: Tensor
    probabilities: Tensor
    last: Tensor
    totals: Totals


def entries(logits: Tensor, k: int, temperature: float, uniforms: Tensor | None = None) -> tuple[Said, Totals]:
    """What is stored of logits float32 [M, V], M > 0, and its sums; rows are left at 0.

    Args:
        k: at most V.
        uniforms: float64 [M], from 0 up to, but not, 1, where ids are to be sampled; None: the k likeliest.

    Raises `BadInput` when the logits are no numbers.
    """
    totals, parts = Totals(), []
    size = max(1, AT_ONCE // logits.shape[1])
    for at in range(0, len(logits), size):
        chunk = logits[at : at + size]
        log_p = (chunk if temperature == 1 else chunk / temperature).log_softmax(1)
        part = _likeliest(log_p, k) if uniforms is None else _sampled(log_p, k, uniforms[at : at + size])
        parts.append(part)
        totals = totals.plus(part.totals)
    if not math.isfinite(totals.entropy):
        raise BadInput(
            "the teacher says nothing",
            "its logits are not finite",
            "check the model with `cabochon run`; 16 bits have to be bfloat16, not float16",
        )
    ids, probabilities, last = (
        torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in ("ids", "probabilities", "last")
    )
    return Said(ids, probabilities, last), totals


def _likeliest(log_p: Tensor, k: int) -> _Part:
    """The k likeliest ids of log-probabilities [C, V], and the rest."""
    p = log_p.exp()
    top, ids = p.topk(k)
    within = _sums(top, log_p.gather(1, ids))
    p.scatter_(1, ids, 0)  # what is left are all others
    rest, without = p.sum(1).double(), _sums(p, log_p)
    evenly = (rest / max(1, p.shape[1] - k)).clamp_min(1e-300).log()
    lost = (without - rest * evenly).clamp_min(0)
    return _Part(ids, top, rest, _totals(rest, within + without, kl_lost=float(lost.sum())))


def _sampled(log_p: Tensor, k: int, uniforms: Tensor) -> _Part:
    """k ids for log-probabilities [C, V], and the threshold."""
    p = log_p.exp()
    within = _sums(p, log_p)
    top, ids = p.topk(k)
    kept = _kept(top, p.scatter_(1, ids, 0).sum(1))
    p.scatter_(1, ids, torch.where(kept, 0, top))
    line = _Line(p)
    threshold = line.total / (k - kept.sum(1)).clamp_min(1)
    behind = (torch.arange(k, device=p.device) - kept.sum(1, keepdim=True)).clamp_min(0)
    drawn = line.at((uniforms.to(p.device)[:, None] + behind) * threshold[:, None])
    probabilities = torch.where(kept, top, p.gather(1, drawn))
    variance = threshold * line.total - torch.linalg.vector_norm(p, dim=1).double().square()
    totals = _totals(line.total, within, variance=float(variance.clamp_min(0).sum()))
    return _Part(torch.where(kept, ids, drawn), probabilities, threshold, totals)


def _kept(top: Tensor, rest: Tensor) -> Tensor:
    """Which of falling probabilities [C, k] are kept, bool [C, k]; `rest` [C] is that of all other ids.

    With the first j kept, what is left has (sum of it) / (k - j) for each place, and that is the threshold as soon as
    the next one is not above it. The sums are made from their small end: a certain teacher leaves next to nothing.
    """
    wide = top.double()
    left = wide.flip(1).cumsum(1).flip(1) + rest[:, None]
    return (wide > left / torch.arange(top.shape[1], 0, -1, device=top.device)).long().cumprod(1).bool()


class _Line:
    """Probabilities [C, V] in line, so that a place in it belongs to an id. In blocks, for speed and for accuracy."""

    def __init__(self, p: Tensor) -> None:
        self.size = p.shape[1]
        self.blocks = pad(p, (0, -p.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        self.ends = self.blocks.sum(2).double().cumsum(1)
        self.total = self.ends[:, -1]

    def at(self, places: Tensor) -> Tensor:
        """ids int64 [C, k] at places float64 [C, k], each below the total."""
        # Where rounding puts a place at the very end, it still belongs to the last id with any probability.
        places = torch.minimum(places, self.total[:, None] * (1 - 1e-12))
        block = torch.searchsorted(self.ends, places, right=True).clamp_max(self.ends.shape[1] - 1)
        before = torch.where(block > 0, self.ends.gather(1, (block - 1).clamp_min(0)), 0)
        rows = torch.arange(len(places), device=places.device)[:, None]
        inner = self.blocks[rows, block].cumsum(2, dtype=torch.float64)
        left = torch.minimum(places - before, inner[..., -1] * (1 - 1e-12))
        within = torch.searchsorted(inner, left[..., None], right=True)[..., 0].clamp_max(BLOCK - 1)
        return (block * BLOCK + within).clamp_max(self.size - 1)  # where nothing is in line at all


def _sums(p: Tensor, log_p: Tensor) -> Tensor:
    """Sums float64 [C] of p log p."""
    return (p * log_p).sum(1).double()


def _totals(left_out: Tensor, p_log_p: Tensor, **sums: float) -> Totals:
    named: dict[str, Any] = sums
    return Totals(tokens=len(left_out), left_out=float(left_out.sum()), entropy=-float(p_log_p.sum()), **named)
