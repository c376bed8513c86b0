"""Methods that look at lengths and angles.

All of them give a sum of their inputs whose coefficients follow from the inner products alone. So the inner products
of whole tensors are measured in one pass, in float64; the geometry happens between a handful of numbers; and a second
pass adds up. K is the number of vectors.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods.average import around, combine, normalized
from cabochon.merge.methods.blocks import MEASURED_BLOCK, Block, Whole, refuse_unless_finite, sums
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings
from cabochon.model.kernels.vectors import inner_products

# mergekit's bounds: below this a vector has no direction, above this cosine SLERP is a straight line.
NO_LENGTH = 1e-8
STRAIGHT = 0.9995

# float32 cannot tell a cosine closer to 1 than this from 1. mergekit asks float32 for equality.
COLINEAR = 1e-7


def gram(whole: Whole, *, weights: bool = False) -> Tensor:
    """Inner products float64 [K, K] between task vectors, or between full weights: the base's, then the models'.

    Raises `BadInput` when one is not finite.
    """

    def between_deltas(block: Block) -> list[float]:
        return inner_products([delta.contiguous().view(-1) for delta in block.deltas()])

    def between_weights(rows: range) -> list[float]:
        *models, base = whole.stored(rows)
        return inner_products([tensor.flatten() for tensor in (base, *models)])

    cut = replace(whole, block=MEASURED_BLOCK)
    parts: Any = cut.run(between_weights, cut.blocks()) if weights else cut.map(between_deltas)
    lower = sums(parts)
    if not torch.isfinite(lower).all():
        for rows in whole.blocks():
            for number, tensor in enumerate(whole.load(rows).tensors, 1):
                refuse_unless_finite(tensor, f"model {number}")
        refuse_unless_finite(lower, "the base model")
    size = (math.isqrt(8 * len(lower) + 1) - 1) // 2
    result = torch.zeros(size, size, dtype=torch.float64)
    i, j = torch.tril_indices(size, size)
    result[i, j] = result[j, i] = lower
    return result


def cosine(products: Tensor, i: int, j: int, least: float = 0.0) -> float:
    """Cosine between vectors i and j of inner products [K, K]; 0 when one is no longer than `least`."""
    lengths = [math.sqrt(products[k, k]) for k in (i, j)]
    if min(lengths) <= least:
        return 0.0
    return max(-1.0, min(1.0, products[i, j].item() / lengths[0] / lengths[1]))


def arc(cos: float, t: float, straight: bool) -> tuple[float, float]:
    """Coefficients of the two ends, at t of the way from the first to the second; on a straight line if asked."""
    if straight:
        return 1 - t, t
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


# slerp


def _slerp(settings: Settings, products: Tensor) -> Apply:
    """From the base (t = 0) to the model (t = 1) along the great circle through both, as directions of full weights.

    As mergekit: a straight line when the cosine is beyond 0.9995 either way. Models with a common ancestor are, so
    that this is nearly always linear interpolation; `warp_slerp` goes around the ancestor instead.
    """
    cos = cosine(products, 0, 1, NO_LENGTH)
    base, model = arc(cos, settings.shared["t"], abs(cos) > STRAIGHT)
    return combine([model], base)


# nuslerp


def _nuslerp_share(settings: Settings) -> float:
    first, second = settings.per_model["weight"]
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def _nuslerp_measure(whole: Whole, settings: Settings) -> Tensor | None:
    """Inner products [2, 2] of whole tensors, or of each column [3, C], or nothing when rows are taken one by one."""
    row_wise = settings.shared["nuslerp_row_wise"] and whole.inputs[0].dim() > 1
    if settings.shared["nuslerp_flatten"]:
        return gram(whole)
    if not row_wise:
        return None

    def products(block: Block) -> Tensor:
        a, b = (vector.double() for vector in block.deltas())
        return torch.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)])

    total = torch.zeros(3, whole.columns, dtype=torch.float64)
    for part in replace(whole, block=MEASURED_BLOCK).map(products):
        total += part
    return total


def _nuslerp(settings: Settings, products: Tensor | None) -> Apply:
    """Between two models, or between their task vectors when there is a base; shares of the way by their weights.

    Angles are taken between whole tensors by default; without `nuslerp_flatten` between rows (slices along the last
    dimension), or with `nuslerp_row_wise` as well, along the first dimension. Colinear vectors take a straight line:
    those whose cosine is 1 or -1 to float32. In mergekit that depends on how a cosine happens to be rounded.
    """
    t = _nuslerp_share(settings)
    if products is not None and products.shape == (2, 2) and settings.shared["nuslerp_flatten"]:
        cos = cosine(products, 0, 1)
        first, second = arc(cos, t, 1 - abs(cos) <= COLINEAR)
        return around((first, second))
    if products is not None:
        columns = _arcs(products[0], products[1], products[2], t)
        return lambda block: _add_around(block, [c.float() for c in columns])

    def rows(block: Block) -> Tensor:
        a, b = (vector.double() for vector in block.deltas())
        dots = [(x * y).sum(-1, keepdim=True) for x, y in ((a, a), (a, b), (b, b))]
        return _add_around(block, [c.float() for c in _arcs(dots[0], dots[1], dots[2], t)])

    return rows


def _arcs(aa: Tensor, ab: Tensor, bb: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """`arc` for many pairs at once, from their inner products in float64."""
    cos = (ab / (aa.sqrt().clamp(min=1e-7) * bb.sqrt().clamp(min=1e-7))).clamp(-1, 1)
    straight = 1 - cos.abs() <= COLINEAR
    angle = torch.acos(cos.masked_fill(straight, 0))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    return first, torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))


def _add_around(block: Block, coefficients: Sequence[Tensor]) -> Tensor:
    total = sum(c * vector for c, vector in zip(coefficients, block.deltas(), strict=True))
    assert isinstance(total, Tensor)
    return total if block.base is None else total + block.base


# multislerp


def _multislerp(settings: Settings, products: Tensor) -> Apply:
    """The weighted mean of directions, as a direction, with the weighted mean of lengths; around the base if given.

    The source takes one step in the tangent space at the mean direction m. For unit vectors u and weights w the step
    is sum(w u) - sum(w u.m) m, and m is sum(w u) scaled, so that the step is zero: mergekit's differs from zero by
    rounding alone, and is left out here. A single model is returned as it is.

    Raises `BadInput`: directions that cancel. Two that do are interpolated linearly, as in mergekit.
    """
    weights: Sequence[float] = settings.per_model["weight"]
    if len(weights) == 1:
        return combine([1.0], 0.0)
    if settings.shared["normalize_weights"]:
        weights = normalized(weights, "multislerp")
    eps = settings.shared["eps"]
    lengths = products.diagonal().sqrt()
    w = torch.tensor(weights, dtype=torch.float64)
    direction = w / (lengths + eps)
    size = math.sqrt(max(0.0, (direction @ products @ direction).item()))
    if size >= max(eps, COLINEAR * w.abs().sum().item()):
        return around((direction / size * (lengths * w).sum()).tolist())
    if len(weights) == 2:
        return around(weights)
    raise BadInput(
        "multislerp cannot find a mean direction",
        "the weighted directions of the models cancel",
        "change the weights",
    )


# karcher


def _karcher(settings: Settings, products: Tensor) -> Apply:
    """The Karcher mean of directions on the sphere (arXiv 2603.04972), with the mean of the lengths.

    Each step moves along the mean of the geodesics towards the inputs. Everything is a sum of inputs, so the steps
    are taken on coefficients. An input opposite to the mean has no geodesic of its own and does not pull.
    """
    count, tol = settings.models, settings.shared["tol"]
    lengths = products.diagonal().sqrt()
    valid = lengths > tol
    if count == 1 or not valid.any():
        return combine([1.0 if count == 1 else 0.0] * count)
    units = torch.where(valid, 1 / lengths.clamp(min=1e-300), 0)
    cosines = products * units.outer(units)
    pull = valid.double() / valid.sum()

    def length(c: Tensor) -> float:
        return math.sqrt(max(0.0, (c @ cosines @ c).item()))

    mean = pull.clone()
    if length(mean) < tol:
        mean = torch.zeros_like(pull)
        mean[valid.nonzero()[0]] = 1
    mean /= length(mean)
    for _ in range(settings.shared["max_iter"]):
        tangent = _tangent(cosines, mean, pull, tol)
        size = length(tangent)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean /= max(length(mean), tol)
    return combine((lengths.mean() * mean * units).tolist())


def _tangent(cosines: Tensor, mean: Tensor, pull: Tensor, tol: float) -> Tensor:
    """Coefficients [K] of the mean geodesic from the mean direction towards the inputs."""
    tangent = torch.zeros_like(mean)
    for i, dot in enumerate((cosines @ mean).clamp(-1, 1).tolist()):
        angle = math.acos(dot)
        if pull[i] and tol <= angle <= math.pi - tol:
            towards = -dot * mean
            towards[i] += 1
            tangent += pull[i] * angle / math.sin(angle) * towards
    return tangent


def _weight() -> Parameter:
    return Parameter("weight", per_model=True)


SLERP = Method(
    "slerp",
    "Shoemake 1985, Animating rotation with quaternion curves",
    _slerp,
    (Parameter("t"),),
    base="required",
    models=(1, 1),
    measure=lambda whole, _: gram(whole, weights=True),
)
NUSLERP = Method(
    "nuslerp",
    "mergekit",
    _nuslerp,
    (_weight(), Parameter("nuslerp_row_wise", bool, False), Parameter("nuslerp_flatten", bool, True)),
    base="optional",
    models=(2, 2),
    measure=_nuslerp_measure,
)
MULTISLERP = Method(
    "multislerp",
    "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    _multislerp,
    (_weight(), Parameter("normalize_weights", bool, True), Parameter("eps", default=1e-8, low=0)),
    base="optional",
    measure=lambda whole, _: gram(whole),
)
KARCHER = Method(
    "karcher",
    "arXiv 2603.04972",
    _karcher,
    (Parameter("max_iter", int, 10, low=0), Parameter("tol", default=1e-5, low=0)),
    measure=lambda whole, _: gram(whole),
)
