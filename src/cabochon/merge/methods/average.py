"""Sums of models with fixed coefficients: everything that is linear ends in `combine`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods.blocks import Block, Combination
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings

SUM_IS_ZERO = 1e-8


def combine(coefficients: Sequence[float], base: float = 0.0) -> Apply:
    """The sum over models of coefficient times tensor, plus the base with its own, in float32."""
    return Combination((*coefficients, base) if base else tuple(coefficients))


def around(coefficients: Sequence[float]) -> Apply:
    """The base plus a sum of task vectors, in float32; without a base, the sum of the models.

    Adding differences leaves the base as it is, to the bit, where the models do not differ from it, and loses nothing
    when coefficients are large. With nothing of the base left in it the sum is made of the models alone.
    """
    if math.fsum(coefficients) == 1:
        return combine(coefficients)
    return partial(_around, tuple(coefficients))


def _around(coefficients: Sequence[float], block: Block) -> Tensor:
    if block.base is None:
        return Combination(tuple(coefficients))(block)
    total = block.base.clone()
    for tensor, coefficient in zip(block.tensors, coefficients, strict=True):
        total.add_(tensor - block.base, alpha=coefficient)
    return total


def normalized(weights: Sequence[float], method: str) -> list[float]:
    """Weights divided by their sum. Raises `BadInput` when that is zero."""
    total = math.fsum(weights)
    if abs(total) < SUM_IS_ZERO:
        raise BadInput(
            f"the weights of {method} cannot be normalised",
            f"{', '.join(f'{w:g}' for w in weights)} sum to zero",
            "change the weights, or switch normalising off",
        )
    return [weight / total for weight in weights]


def _linear(settings: Settings, _: Any) -> Apply:
    """Weighted mean, or weighted sum without `normalize`."""
    weights = settings.per_model["weight"]
    return combine(normalized(weights, "linear") if settings.shared["normalize"] else weights)


def _passthrough(settings: Settings, _: Any) -> Apply:
    """One model as it is, or times `scale`."""
    scale = settings.per_model["scale"][0]
    return (lambda block: block.tensors[0]) if scale is None else combine([scale])


LINEAR = Method(
    "linear",
    "model soups, arXiv 2203.05482",
    _linear,
    (Parameter("weight", per_model=True), Parameter("normalize", bool, True)),
)
PASSTHROUGH = Method(
    "passthrough",
    "copies; layers of several models are stacked by slices",
    _passthrough,
    (Parameter("scale", default=None, per_model=True),),
    models=(1, 1),
)
