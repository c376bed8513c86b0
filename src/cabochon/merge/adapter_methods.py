"""How one matrix of several adapters becomes that of one adapter, by the names that PEFT's add_weighted_adapter has.

    cat      all A below, all B beside each other: exactly the sum; the ranks add up
    svd      the best approximation of that sum of a given rank (Eckart and Young 1936)
    linear   the sum of all A times the sum of all B, each with the root of its adapter's weight and scale

and, like `linear` on A and B apart, of which each element can be dropped first:

    magnitude_prune   all but the largest, a share `density`
    ties              the same, then elements whose sign loses (TIES, arXiv 2306.01708)
    dare_linear       at random, what is kept divided by `density` (DARE, arXiv 2311.03099)
    dare_ties         the same, then elements whose sign loses

or, with `_svd` behind the name, on B A, the sum of which is then cut to a rank. A and B apart multiply every adapter's
B with every other's A: not even `linear` is a sum of adapters, but its rank does not grow.

N and K are a matrix's outputs and inputs, r the rank. All results equal those of PEFT 0.21.2, except that of equal
magnitudes the earlier counts as the larger, and that at least one is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import Parameter, Settings, bind, tensor_seed
from cabochon.merge.methods.sparsify import MAGNITUDE, RANDOM, Sparsifier
from cabochon.weights.adapters import Delta

ROWS = 4096  # that are brought to float64 at once
MAJORITIES = ("total", "frequency")  # signs are weighed by their magnitudes, or counted
_WEIGHT = Parameter("weight", per_model=True)
_DENSITY = Parameter("density", default=1.0, per_model=True, low=0, high=1)
_RANK = Parameter("rank", int, None, low=1)


@dataclass(frozen=True)
class Combination:
    """One of the names above.

    Attributes:
        sparsifier: chooses the elements that are kept; None keeps all.
        consensus: elements whose sign loses are left out, and the others averaged.
        product: it works on B A, not on A and B apart.
        exact: it is the sum of what the adapters add, before any cut.
    """

    name: str
    sparsifier: Sparsifier | None = None
    consensus: bool = False
    product: bool = False
    exact: bool = False

    @property
    def cuts(self) -> bool:
        """Whether the result has a rank of its own."""
        return self.name.endswith("svd")

    @property
    def random(self) -> bool:
        return self.sparsifier is RANDOM

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What it can be told; a rank that is left out is the highest of the adapters'."""
        return (_WEIGHT, *(_DENSITY,) * (self.sparsifier is not None), *(_RANK,) * self.cuts)


@dataclass(frozen=True)
class Merged:
    """One matrix of the result, b @ a, float32: `a` [r, K], `b` [N, r]. Squared lengths before a cut and after it."""

    a: Tensor
    b: Tensor
    whole: float = 0.0
    kept: float = 0.0


def _pair(name: str, sparsifier: Sparsifier, consensus: bool) -> tuple[Combination, Combination]:
    return (
        Combination(name, sparsifier, consensus),
        Combination(f"{name}_svd", sparsifier, consensus, product=True),
    )


COMBINATIONS: dict[str, Combination] = {
    combination.name: combination
    for combination in (
        *(Combination("cat", exact=True), Combination("svd", exact=True), Combination("linear")),
        *_pair("magnitude_prune", MAGNITUDE, False),
        *_pair("ties", MAGNITUDE, True),
        *_pair("dare_linear", RANDOM, False),
        *_pair("dare_ties", RANDOM, True),
    )
}


def combine(
    deltas: Sequence[Delta],
    combination: Combination,
    settings: Settings,
    *,
    majority: str = "total",
    embedding: bool = False,
) -> Merged:
    """Merge one matrix of the adapters that change it.

    Args:
        deltas: what each of them adds.
        combination: how.
        settings: weight and density of each, in the same order; the rank of the result, where it has one.
        majority: one of `MAJORITIES`.
        embedding: whether it is the embedding, of which PEFT has A and B the other way round.

    Raises `BadInput`: ranks differ where A and B are merged apart.
    """
    weights = settings.per_model["weight"]
    if combination.exact:
        merged = _sum(deltas, weights)
        return _cut(merged, settings.shared["rank"] or _rank(deltas)) if combination.cuts else merged
    if combination.product:
        products = [(delta.b.float() @ delta.a.float()).mul_(delta.scale) for delta in deltas]
        total = _combined(products, weights, combination, settings, majority, "")
        return _cut_dense(total, settings.shared["rank"] or _rank(deltas))
    if len({len(delta.a) for delta in deltas}) > 1:
        raise BadInput(
            f"{combination.name} cannot merge these adapters",
            f"they have ranks {', '.join(str(len(delta.a)) for delta in deltas)}, and A and B are merged apart",
            f"use cat, or {'svd' if combination.name == 'linear' else combination.name + '_svd'}",
        )
    scaled = [w * delta.scale for w, delta in zip(weights, deltas, strict=True)]
    # A negative weight changes the sign of A alone, or it would cancel.
    roots = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
    of_a, of_b = (roots, signed) if embedding else (signed, roots)
    a = _combined([delta.a.float() for delta in deltas], of_a, combination, settings, majority, "a")
    b = _combined([delta.b.float() for delta in deltas], of_b, combination, settings, majority, "b")
    return Merged(a, b)


def _combined(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    combination: Combination,
    settings: Settings,
    majority: str,
    part: str,
) -> Tensor:
    """The weighted sum of tensors of one shape, thinned out; of those that agree in sign, the weighted mean."""
    kept = [tensor.contiguous() for tensor in tensors]
    densities = settings.per_model.get("density", (1.0,) * len(kept))
    if combination.sparsifier:
        given = [{"weight": 1.0, "density": density} for density in densities]
        bound = bind(METHODS["ties"], {}, given, seed=tensor_seed(settings.seed, part))
        thins = combination.sparsifier.thins(Whole(tuple(kept)), bound)
        kept = [thin(tensor, 0) for thin, tensor in zip(thins, kept, strict=True)]
    if combination.random:
        kept = [tensor / density if density else tensor for tensor, density in zip(kept, densities, strict=True)]
    total, count = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
    if not combination.consensus:
        for tensor, weight in zip(kept, weights, strict=True):
            total.add_(tensor, alpha=weight)
        return total
    votes = kept if majority == "total" else [tensor.sign() for tensor in kept]
    sign = torch.where(torch.stack(list(votes)).sum(0) >= 0, 1.0, -1.0)
    for tensor, weight in zip(kept, weights, strict=True):
        agree = (tensor.sign() == sign).float()
        total.add_(tensor * agree, alpha=weight)
        count.add_(agree)
    return total.div_(count.clamp_(min=1))


def _rank(deltas: Sequence[Delta]) -> int:
    return max(len(delta.a) for delta in deltas)


def _sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Merged:
    """All A [R, K] below each other, all B [N, R] with their weights and scales, float64."""
    a = torch.cat([delta.a.double() for delta in deltas])
    b = torch.cat([d.b.double() * (w * d.scale) for d, w in zip(deltas, weights, strict=True)], dim=1)
    return Merged(a, b)


def _cut(merged: Merged, rank: int) -> Merged:
    """The best of a rank. The sum of K adapters has a low one itself, so that its singular values are those of a small
    matrix between two thin ones, and no matrix of the model's size is made.
    """
    left, upper = torch.linalg.qr(merged.b)
    right, lower = torch.linalg.qr(merged.a.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    # Both factors get the root, so that neither leaves the range of small types.
    roots = values[:rank].sqrt()
    squares = values.square()
    a, b = roots[:, None] * v[:rank] @ right.T, left @ u[:, :rank] * roots
    return Merged(a, b, float(squares.sum()), float(squares[:rank].sum()))


def _cut_dense(matrix: Tensor, rank: int) -> Merged:
    """The best of a rank of any matrix [N, K]: its projection on the leading directions of the smaller side."""
    wide = matrix.shape[0] < matrix.shape[1]
    parts = (matrix.T if wide else matrix).split(ROWS)
    products = torch.zeros(min(matrix.shape), min(matrix.shape), dtype=torch.float64)
    for part in parts:
        products += part.T.double() @ part.double()
    squares, directions = torch.linalg.eigh(products)  # ascending
    directions = directions[:, -rank:].flip(1)
    projected = torch.cat([part.double() @ directions for part in parts])
    roots = torch.linalg.vector_norm(projected, dim=0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    left, right = projected / roots, (directions * roots).T
    a, b = (left.T, right.T) if wide else (right, left)
    return Merged(a, b, float(squares.clamp_min(0).sum()), float(squares[-rank:].clamp_min(0).sum()))
