"""Where a teacher's distribution comes from, and the loss of a chunk of student logits against it.

    LiveTeacher     hidden states and head of a model: its logits are made chunk by chunk beside the student's
    MixedTeachers   several of these, whose probabilities are averaged
    TopKTeacher     its k likeliest ids with their probabilities; the others are one bucket
    SampledTeacher  draws from it, for an unbiased estimate of the forward KL

A stored teacher takes 1300 times less room than its logits: 64 ids are 384 bytes, 256,000 logits 512 kB.

Dimension letters: M tokens of the batch, C of the chunk, V vocabulary, k ids of a token, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.model.kernels import losses
from cabochon.train.losses.divergences import Divergence, kernel_kind
from cabochon.train.losses.logits import (
    LogitTransform,
    fused,
    log_normaliser,
    normaliser_of_rest,
    picked,
    widened,
    write_gradient,
)


@dataclass(frozen=True)
class Head:
    """An output head: weight [V, D] and soft cap (None: off)."""

    weight: Tensor
    soft_cap: float | None


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher's final hidden states [M, D] and its head, both without gradients. D need not be the student's."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class MixedTeachers:
    """Live teachers of the same M tokens, and the share that each one's probabilities have; shares add up to 1."""

    teachers: tuple[LiveTeacher, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class TopKTeacher:
    """The k likeliest ids int64 [M, k] of each token, all different, and their probabilities [M, k].

    What is left of a row's sum to 1 belongs to all other ids together. The loss compares k + 1 buckets, so it is
    never more than the divergence itself (data processing inequality), and ids without a bucket keep the student's
    own proportions. The probabilities are those at the temperature that the loss is asked for.
    """

    ids: Tensor
    probabilities: Tensor

    def rows(self, rows: Tensor) -> "TopKTeacher":
        """The teacher of some tokens, int64 [C]."""
        return TopKTeacher(self.ids[rows], self.probabilities[rows])


@dataclass(frozen=True)
class SampledTeacher:
    """Weighted draws: the sum of weights [M, k] at ids int64 [M, k] is the teacher's probability, in expectation.

    n draws from the teacher itself weigh 1 / n each; draws from another distribution the quotient of both, and
    the likeliest ids can be there with their probability beside draws from the rest. Since the forward KL is linear
    in the teacher's distribution, value and gradient are unbiased. Renormalised top k is not (arXiv 2503.16870).

    Args:
        probabilities: the teacher's own at the ids, [M, k]; they matter for the value alone.
    """

    ids: Tensor
    probabilities: Tensor
    weights: Tensor

    def rows(self, rows: Tensor) -> "SampledTeacher":
        """The draws of some tokens, int64 [C]."""
        return SampledTeacher(self.ids[rows], self.probabilities[rows], self.weights[rows])


Teacher = LiveTeacher | MixedTeachers | TopKTeacher | SampledTeacher


def against_live(
    raw: Tensor,
    teacher_raw: Tensor,
    weights: Tensor,
    divergence: Divergence,
    transform: LogitTransform,
    teacher_cap: float | None,
) -> Tensor:
    """Losses [C] of raw logits [C, V], which are replaced by their gradient, against those of a teacher.

    Args:
        weights: [C], what each token's loss and gradient are multiplied by.
        transform: the student's; the temperature is the teacher's, too.
    """
    kind, soft_caps = kernel_kind(divergence), (transform.soft_cap, teacher_cap)
    if kind is not None:
        done = losses.divergence_in_place(raw, teacher_raw, weights, kind, soft_caps, transform.temperature)
        if done is not None:
            return done
    return fused(_against_live, raw)(raw, teacher_raw, weights, divergence, transform, teacher_cap)


def _against_live(
    raw: Tensor,
    teacher_raw: Tensor,
    weights: Tensor,
    divergence: Divergence,
    transform: LogitTransform,
    teacher_cap: float | None,
) -> Tensor:
    log_q = transform.apply(raw).log_softmax(1)
    log_p = LogitTransform(teacher_cap, transform.temperature).apply(teacher_raw).log_softmax(1)
    values, gradient = divergence.value_and_logit_gradient(log_p, log_q)
    raw.copy_(gradient.mul_(weights[:, None]).mul_(transform.slope(raw)))
    return weights * values


def against_top_k(
    raw: Tensor, teacher: TopKTeacher, weights: Tensor, divergence: Divergence, transform: LogitTransform
) -> Tensor:
    """Losses [C] of raw logits [C, V], which are replaced by their gradient, over k + 1 buckets."""
    k = teacher.ids.shape[1]
    probabilities, logits = widened(teacher.probabilities), picked(raw, teacher.ids, transform)
    rest = torch.zeros_like(logits[:, 0])
    if k < raw.shape[1]:  # otherwise nothing is left for a bucket
        rest = normaliser_of_rest(raw, teacher.ids, transform)
        logits, probabilities = torch.cat([logits, rest[:, None]], dim=1), with_rest(probabilities)
    log_p = probabilities.log().to(logits.dtype)
    values, gradient = divergence.value_and_logit_gradient(log_p, logits.log_softmax(1))
    gradient *= weights[:, None]
    # What the last bucket gets goes to its ids in the student's own proportions.
    softmax = rest, gradient[:, -1], torch.zeros_like(rest)
    write_gradient(raw, transform, softmax, teacher.ids, gradient[:, :k])
    return weights * values


def with_rest(probabilities: Tensor) -> Tensor:
    """Probabilities [C, k] and, behind them, that of everything else [C, k + 1].

    The rest is at least the rounding error of 1: it is a difference, and a rest of 0 would make reverse KL infinite.
    """
    left = 1 - probabilities.sum(1, keepdim=True)
    return torch.cat([probabilities, left.clamp_min(torch.finfo(left.dtype).eps)], dim=1)


def against_draws(raw: Tensor, teacher: SampledTeacher, weights: Tensor, transform: LogitTransform) -> Tensor:
    """Estimates [C] of the forward KL of raw logits [C, V], which are replaced by the estimate of their gradient."""
    normaliser = log_normaliser(raw, transform)
    log_q = picked(raw, teacher.ids, transform) - normaliser[:, None]
    shares = widened(teacher.weights).to(log_q.dtype)
    log_p = widened(teacher.probabilities).to(log_q.dtype).log()
    values = torch.where(shares > 0, shares * (log_p - log_q), 0).sum(1)
    multiple = weights * shares.sum(1)
    # An id drawn several times has all its shares at each of its places. One place after the other: all at once would
    # take more memory than the logits of a small vocabulary.
    summed = torch.stack([torch.where(teacher.ids == one[:, None], shares, 0).sum(1) for one in teacher.ids.T], dim=1)
    at_ids = multiple[:, None] * log_q.exp() - weights[:, None] * summed
    write_gradient(raw, transform, (normaliser, multiple, torch.zeros_like(multiple)), teacher.ids, at_ids)
    return weights * values
