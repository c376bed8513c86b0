"""Divergences of a student's distribution Q from a teacher's P, and their gradients with respect to Q's logits.

    forward KL        sum P log(P / Q)                  Q covers P; arXiv 1503.02531, section 2, and the entropy of P
    reverse KL        sum Q log(Q / P)                  Q seeks a mode; arXiv 2306.08543, section 2
    Jensen-Shannon    b KL(P | M) + (1 - b) KL(Q | M),  M = b P + (1 - b) Q; arXiv 2306.13649, section 2
    total variation   sum |P - Q| / 2                   arXiv 2307.15190, section 3

All are written on log-probabilities, over the whole vocabulary as well as over a few buckets of it. For a loss L(Q)
with g_j = dL/dQ_j the softmax gives dL/dz_j = Q_j (g_j - sum Q g). All values are in nats.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cabochon.base.errors import UsageError


class Divergence(Protocol):
    """What the losses below have in common."""

    def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Values [C], and the gradient [C, V] with respect to the logits of Q.

        Args:
            log_p: the teacher's log-probabilities [C, V]; may be -inf where the loss allows it.
            log_q: the student's, finite.
        """
        ...


@dataclass(frozen=True)
class ForwardKL:
    """KL(P | Q), the loss of Gemma 2's distillation (arXiv 2408.00118, section 3) less the teacher's entropy."""

    def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`; dL/dz = Q - P."""
        p = log_p.exp()
        return _weighted(p, log_p - log_q), log_q.exp() - p


@dataclass(frozen=True)
class ReverseKL:
    """KL(Q | P); infinite where the teacher rules out what the student allows."""

    def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`; dL/dz = Q (log(Q / P) - KL)."""
        q, ratio = log_q.exp(), log_q - log_p
        value = _weighted(q, ratio)
        return value, q * (ratio - value[:, None])


@dataclass(frozen=True)
class JensenShannon:
    """The generalised Jensen-Shannon divergence, with the convention of GKD for the ends.

    The formula itself is 0 at beta 0 and 1. GKD (arXiv 2306.13649) calls forward KL the
    divergence of beta 0 and reverse KL that of beta 1: the limits of the formula divided by beta, and by 1 - beta.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UsageError(
                f"beta {self.beta} is no Jensen-Shannon divergence", "it mixes two distributions", "0 to 1"
            )

    def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`; dL/dz = (1 - b) Q (log(Q / M) - KL(Q | M))."""
        if self.beta in (0, 1):
            end = ForwardKL() if self.beta == 0 else ReverseKL()
            return end.value_and_logit_gradient(log_p, log_q)
        b = self.beta
        shifts = log_p.new_tensor([b, 1 - b]).log()
        log_m = torch.logaddexp(log_p + shifts[0], log_q + shifts[1])
        p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_m
        from_m = _weighted(q, ratio)
        value = b * _weighted(p, log_p - log_m) + (1 - b) * from_m
        return value, (1 - b) * q * (ratio - from_m[:, None])


@dataclass(frozen=True)
class TotalVariation:
    """Half the sum of absolute differences; its gradient is taken as 0 where P and Q agree."""

    def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`; g = sign(Q - P) / 2."""
        q = log_q.exp()
        apart = q - log_p.exp()
        slopes = apart.sign() / 2
        return apart.abs().sum(1) / 2, q * (slopes - (q * slopes).sum(1, keepdim=True))


def kernel_kind(divergence: Divergence) -> tuple[str, float] | None:
    """What the compiled kernel calls it, with beta; None: it knows no such divergence."""
    match divergence:
        case ForwardKL() | JensenShannon(beta=0):
            return "forward_kl", 0.0
        case ReverseKL() | JensenShannon(beta=1):
            return "reverse_kl", 1.0
        case JensenShannon(beta=beta):
            return "jensen_shannon", beta
        case TotalVariation():
            return "total_variation", 0.0
    return None


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sums over rows of products, where a weight of 0 makes 0 of an infinite value."""
    return torch.where(weights > 0, weights * values, 0).sum(1)
