"""Methods that add task vectors, the differences of models from a base, to the base.

They are one formula: thin out each task vector, weight it, perhaps keep only the elements whose sign wins, add up.
The table at the end says which method does what. All work in float32: with bfloat16 models mergekit subtracts, ranks
and adds in bfloat16, unless its `dtype` is float32, which is what the results here equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods.average import SUM_IS_ZERO
from cabochon.merge.methods.blocks import Block, Whole
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.merge.methods.sparsify import (
    BY_RANK,
    MAGNITUDE,
    OUTLIERS,
    RANDOM,
    Sparsifier,
    Thin,
    everything,
    restored,
)


@dataclass(frozen=True)
class Term:
    """What becomes of one task vector: thinned out, then scaled; `weight` is its share when signs are counted."""

    thin: Thin
    scale: float
    weight: float


def added(terms: Sequence[Term], block: Block) -> Tensor:
    """Weighted sum of task vectors float32 [r, C]."""
    total: Tensor | None = None
    for term, delta in zip(terms, block.deltas(), strict=True):
        kept = term.thin(delta, block.start)
        total = kept * term.scale if total is None else total.add_(kept, alpha=term.scale)
    assert total is not None
    return total


def elected(terms: Sequence[Term], normalize: bool, block: Block) -> Tensor:
    """Sum of those elements whose sign is that of the sum of all, float32 [r, C]; a sum of zero elects plus.

    With `normalize` divided by the weights of those that agree, so that weights of 1 give their mean. The vote is by
    weighted elements, as in mergekit; in the paper all weights are 1.
    """
    if len(terms) == 1:  # nobody to outvote it
        (term,), (delta,) = terms, block.deltas()
        return term.thin(delta, block.start) * (term.scale / (term.weight or 1) if normalize else term.scale)
    scaled = [t.thin(d, block.start) * t.scale for t, d in zip(terms, block.deltas(), strict=True)]
    total = scaled[0].clone()
    for values in scaled[1:]:
        total.add_(values)
    sign = torch.copysign(torch.ones(()), total)
    shares: Tensor | None = torch.zeros_like(total) if normalize else None
    total.zero_()
    for values in scaled:
        total.add_(values.mul_(sign).relu_())  # those that agree, without their sign
    if shares is not None:
        for values, term in zip(scaled, terms, strict=True):
            shares.add_(values.sign_(), alpha=term.weight)
        total.div_(_nonzero(shares, [term.weight for term in terms]))
    return total.mul_(sign)


def _nonzero(shares: Tensor, weights: Sequence[float]) -> Tensor:
    """Divisors with 1 in the place of 0, in place."""
    least = min(weights)
    if least > 0:  # then zero means that nothing was kept, and any divisor will do; this is the quick way
        return shares.clamp_(min=least)
    return shares.masked_fill_(shares == 0, 1)


def _terms(whole: Whole, settings: Settings, sparsifier: Sparsifier) -> list[Term]:
    thins = sparsifier.thins(whole, settings)
    idle = all(thin is everything for thin in thins)
    factors = restored(whole, thins) if settings.shared["rescale"] and not idle else [1.0] * len(thins)
    weights = settings.per_model["weight"]
    return [Term(thin, w * factor, w) for thin, factor, w in zip(thins, factors, weights, strict=True)]


def _divisor(weights: Sequence[float], method: str) -> float:
    total = math.fsum(weights)
    if abs(total) < SUM_IS_ZERO:
        raise BadInput(
            f"the weights of {method} cannot be normalised",
            f"{', '.join(f'{w:g}' for w in weights)} sum to zero",
            "change the weights, or set normalize to false",
        )
    return total


def _prepare(settings: Settings, terms: list[Term] | None, consensus: bool) -> Apply:
    weights = settings.per_model["weight"]
    used = terms or [Term(everything, w, w) for w in weights]
    normalize, scale = settings.shared["normalize"], settings.shared["lambda"]
    if consensus:
        return lambda block: block.added_to_base(elected(used, normalize, block), scale)
    scale = scale / _divisor(weights, settings.method) if normalize else scale
    return lambda block: block.added_to_base(added(used, block), scale)


def _method(
    name: str, source: str, sparsifier: Sparsifier | None, *, consensus: bool, normalize: bool, rescale: bool
) -> Method:
    parameters = (
        Parameter("weight", per_model=True),
        Parameter("density", default=1.0, per_model=True, low=0, high=1),
        Parameter("normalize", bool, normalize),
        Parameter("rescale", bool, rescale),
        Parameter("lambda", default=1.0),
        Parameter("int8_mask", bool, False),  # the type of mergekit's masks in memory; there are none here
    )

    def measure(whole: Whole, settings: Settings) -> list[Term]:
        assert sparsifier is not None
        return _terms(whole, settings, sparsifier)

    def prepare(settings: Settings, measured: Any) -> Apply:
        return _prepare(settings, measured, consensus)

    return Method(
        name,
        source,
        prepare,
        parameters + (sparsifier.parameters if sparsifier else ()),
        base="required",
        measure=measure if sparsifier else None,
        random=sparsifier in (RANDOM, BY_RANK),
    )


_TIES, _DARE = "TIES, arXiv 2306.01708", "DARE, arXiv 2311.03099"
_CRUMBS, _DELLA = "Model Breadcrumbs, arXiv 2312.06795", "DELLA, arXiv 2406.11617"

TASK_VECTOR_METHODS = (
    _method("task_arithmetic", "arXiv 2212.04089", None, consensus=False, normalize=False, rescale=False),
    _method("ties", _TIES, MAGNITUDE, consensus=True, normalize=True, rescale=False),
    _method("dare_linear", _DARE, RANDOM, consensus=False, normalize=False, rescale=True),
    _method("dare_ties", _DARE, RANDOM, consensus=True, normalize=False, rescale=True),
    _method("breadcrumbs", _CRUMBS, OUTLIERS, consensus=False, normalize=False, rescale=False),
    _method("breadcrumbs_ties", _CRUMBS, OUTLIERS, consensus=True, normalize=False, rescale=False),
    _method("della_linear", _DELLA, BY_RANK, consensus=False, normalize=False, rescale=True),
    _method("della", _DELLA, BY_RANK, consensus=True, normalize=True, rescale=True),
)
