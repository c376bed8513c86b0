"""Several layers of the same input at once: on a GPU in one kernel for a single row; packed ones round it only once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from cabochon.model.kernels import cuda, elementwise
from cabochon.model.linear import Linear, QuantLinear, rounded_products


def together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """What up to three linear layers make of x [..., K]."""
    joined = _row(x, layers, gated=False)
    if joined is None:
        return _each(x, layers)
    sizes = [layer.rows if isinstance(layer, QuantLinear) else layer.out_features for layer in layers]
    return list(joined.split(sizes, -1))


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """gelu(gate(x)) * up(x), the tanh form of GELU."""
    joined = _row(x, (gate, up), gated=True)
    if joined is not None:
        return joined
    first, second = _each(x, (gate, up))
    fused = elementwise.gelu_times(first, second)
    return gelu(first, approximate="tanh") * second if fused is None else fused


def _each(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """One after the other."""
    if _alike(layers) and not (torch.is_grad_enabled() and x.requires_grad):
        return rounded_products(x, layers)
    return [layer(x) for layer in layers]


def _row(x: Tensor, layers: Sequence[Any], *, gated: bool) -> Tensor | None:
    """The outputs side by side; None where no kernel does that."""
    if x.numel() != x.shape[-1] or not cuda.usable(x):
        return None
    if all(type(layer) is Linear and layer.weight.dtype is x.dtype for layer in layers):
        from cabochon.model.kernels.cuda.rows import float_row

        joined = float_row(x, [layer.weight for layer in layers], gated=gated)
    elif _alike(layers) and layers[0].padded == layers[0].columns:
        from cabochon.model.kernels.cuda.rows import packed_row

        joined = packed_row(x, layers, gated=gated)
    else:
        return None
    return joined.view(*x.shape[:-1], -1)


def _alike(layers: Sequence[Any]) -> bool:
    """Whether all are quantised, in one and the same way."""
    if any(type(layer) is not QuantLinear for layer in layers):
        return False
    kinds = {(layer.bits, layer.group, layer.columns, layer.exact) for layer in layers}
    return len(kinds) == 1 and not layers[0].exact
