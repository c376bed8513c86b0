"""One chunk of logits: soft cap, temperature, log-normaliser, and the gradient written where the logits were.

Raw logits r are what the head's product gives. The distribution is the softmax of

    z = cap * tanh(r / cap) / temperature          dz/dr = (1 - tanh(r / cap)^2) / temperature

Gradients of most losses with respect to z are a multiple of the softmax q, a constant, and something more at a few
ids; `write_gradient` writes that form. In float32, or float64 for raw logits in it, up to the last store.

Dimension letters: C tokens of the chunk, V vocabulary, k ids of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from cabochon.model.kernels import losses

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class LogitTransform:
    """From raw logits to those of the distribution: soft cap (None: off), then division by the temperature."""

    soft_cap: float | None
    temperature: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """z of raw logits of any shape; a new tensor."""
        wide = widened(raw)
        if self.soft_cap is not None:
            wide = torch.tanh(wide / self.soft_cap) * self.soft_cap
        return wide / self.temperature

    def slope(self, raw: Tensor) -> Tensor:
        """dz/dr at raw logits of any shape."""
        wide = widened(raw)
        if self.soft_cap is None:
            return torch.full_like(wide, 1 / self.temperature)
        return (1 - torch.tanh(wide / self.soft_cap).square()) / self.temperature


def fused(formula: Callable[P, T], raw: Tensor) -> Callable[P, T]:
    """A formula over logits as one kernel where these are on a GPU: it walks over them once, not once an operation."""
    return _compiled(formula) if raw.device.type == "cuda" else formula


@cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(formula)


def widened(x: Tensor) -> Tensor:
    """x in the precision that losses are computed in: float64 as it is, everything else as float32."""
    return x if x.dtype is torch.float64 else x.float()


def log_normaliser(raw: Tensor, transform: LogitTransform) -> Tensor:
    """log of the sum of exp(z) [C] of raw [C, V]."""
    done = losses.log_normaliser(raw, transform.soft_cap, transform.temperature)
    return fused(_log_normaliser, raw)(raw, transform) if done is None else done


def _log_normaliser(raw: Tensor, transform: LogitTransform) -> Tensor:
    return transform.apply(raw).logsumexp(1)


def normaliser_of_rest(raw: Tensor, ids: Tensor, transform: LogitTransform) -> Tensor:
    """log of the sum of exp(z) [C] of raw [C, V] over all but the ids int64 [C, k], all different.

    Not a difference of two sums: a student may give the rest less than the rounding error of its whole.
    """
    kept = raw.gather(1, ids)
    _put(raw, ids, raw.new_tensor(float("-inf")))
    rest = log_normaliser(raw, transform)
    _put(raw, ids, kept)
    if transform.soft_cap is None:
        return rest
    # The cap has lifted -inf to -cap, which no other logit is below: what k of them add is k / V of the sum at most.
    lifted = torch.exp(-transform.soft_cap / transform.temperature - rest)
    return rest + torch.log1p(-ids.shape[1] * lifted)


def mean_logit(raw: Tensor, transform: LogitTransform) -> Tensor:
    """Mean of z over the vocabulary [C] of raw [C, V]."""
    return transform.apply(raw).mean(1)


def picked(raw: Tensor, ids: Tensor, transform: LogitTransform) -> Tensor:
    """z [C, k] of raw [C, V] at ids int64 [C, k]."""
    return transform.apply(raw.gather(1, ids))


def write_gradient(
    raw: Tensor,
    transform: LogitTransform,
    softmax: tuple[Tensor, Tensor, Tensor],
    ids: Tensor,
    at_ids: Tensor,
) -> None:
    """Replace raw [C, V] by the gradient with respect to it, given in parts as that with respect to z.

    What lies at the ids is given apart and rounded once: q - 1 of a likely target is small, and a rounded q less 1
    would be mostly rounding error.

    Args:
        softmax: normaliser, multiple and constant, [C] each: multiple * exp(z - normaliser) + constant.
        ids: int64 [C, k]; one that a row has twice has the same value both times.
        at_ids: [C, k], the gradient with respect to z there, whatever the formula says.
    """
    exact = (at_ids * transform.slope(raw.gather(1, ids))).to(raw.dtype)
    _write_softmax(raw, transform, *softmax)
    _put(raw, ids, exact)


def _write_softmax(
    raw: Tensor, transform: LogitTransform, normaliser: Tensor, multiple: Tensor, constant: Tensor
) -> None:
    settings = transform.soft_cap, transform.temperature
    if losses.softmax_gradient_in_place(raw, *settings, normaliser, multiple, constant):
        return
    fused(_softmax_gradient, raw)(raw, transform, normaliser, multiple, constant)


def _softmax_gradient(
    raw: Tensor, transform: LogitTransform, normaliser: Tensor, multiple: Tensor, constant: Tensor
) -> None:
    gradient = transform.apply(raw).sub_(normaliser[:, None]).exp_()
    gradient.mul_(multiple[:, None]).add_(constant[:, None])
    raw.copy_(gradient.mul_(transform.slope(raw)))


def _put(raw: Tensor, ids: Tensor, values: Tensor) -> None:
    """raw [C, V] at ids int64 [C, k] becomes values. `scatter_` does it too, after a copy of all of raw."""
    raw[torch.arange(len(raw), device=raw.device)[:, None], ids] = values
