"""Sums of models with fixed coefficients: everything that is linear ends in `combine`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.methods.blocks import Block
from cabochon.merge.methods.method import Apply, Method, Parameter, Settings

SUM_IS_ZERO = 1e-8


def combine(coefficients: Sequence[float], base: float = 0.0) -> Apply:
    """The sum over models of coefficient times tensor, plus the base with its own, in float32."""
    return partial(_combine, tuple(coefficients), base)


def _combine(coefficients: Sequence[float], base: float, block: Block) -> Tensor:
    total: Tensor | None = None
    terms = [*zip(block.tensors, coefficients, strict=True), *([(block.base, base)] if block.base is not None else [])]
    for tensor, coefficient in terms:
        if total is None:
            total = torch.mul(tensor, coefficient)
        else:
            total.add_(tensor, alpha=coefficient)
    assert total is not None
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
