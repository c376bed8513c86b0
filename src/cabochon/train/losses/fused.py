"""The walk over chunks of tokens: a head loss, its value and its gradients, without the logits of the batch.

The gradient with respect to a chunk's logits is known as soon as the chunk's loss is: both products that follow
from it, towards the hidden states and towards the weight, are made at once, and the chunk's memory serves the next
one. `backward` only multiplies. So three products are made, as many as without chunks, and nothing is made twice.
The idea is that of Liger (arXiv 2410.10989, section 3.2); here both soft caps and every divergence are included.

Dimension letters: M tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.model.kernels.losses import add_in_place, large
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.losses.divergences import Divergence, ForwardKL
from cabochon.train.losses.likelihood import TokenLoss, of_likelihood
from cabochon.train.losses.live import MIXED_WIDTH, LiveLoss, live_ones
from cabochon.train.losses.logits import LogitTransform
from cabochon.train.losses.teachers import (
    Head,
    MixedTeachers,
    SampledTeacher,
    Teacher,
    TopKTeacher,
    against_draws,
    against_top_k,
)

CHUNK_BYTES = 128 * 2**20
BLOCK = 64_000  # ids of the vocabulary; smaller ones would make products slower

# Raw logits [C, V], rows int64 [C] of the batch, weights [C] -> losses [C]; the logits become their gradient.
ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Walk:
    """How the batch is walked.

    Args:
        chunk_bytes: what the logits of a chunk may take, those of a live teacher included.
        weight_gradient: what the weight's gradient is added up in, chunk by chunk; None: float32, or float64 for
            weights in it. bfloat16 saves half of that memory and rounds after each chunk.
    """

    chunk_bytes: int = CHUNK_BYTES
    weight_gradient: torch.dtype | None = None


@dataclass(frozen=True)
class Blend:
    """Cross-entropy as a share of a divergence's loss, from the same logits.

    Args:
        targets: int64 [M], an id wherever a token counts.
        share: of the loss, between 0 and 1.
        kind: label smoothing and z-loss. The temperature is 1.
    """

    targets: Tensor
    share: float
    kind: CrossEntropy = CrossEntropy()


def cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    count: float,
    kind: CrossEntropy = CrossEntropy(),
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    walk: Walk = Walk(),
) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, divided by count; a scalar with gradients for hidden and head.

    Args:
        hidden: [M, D].
        head: its weight may be float32 while products are bfloat16, under autocast.
        targets: int64 [M]; tokens with a negative one are left out, and cost nothing.
        count: tokens of the whole step, over all its parts.
        weights: [M], what single tokens count for; None: 1.

    Raises:
        UsageError: shapes do not fit, or the temperature is not positive.
    """
    _check(hidden, head, temperature, targets)
    transform = LogitTransform(head.soft_cap, temperature)

    def losses(raw: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        return kind.value_and_logit_gradient(raw, targets[rows], shares, transform)

    return _walk(hidden, head, losses, (targets >= 0, weights, count), walk)


def likelihood(
    hidden: Tensor, head: Head, targets: Tensor, loss: TokenLoss, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """Sum over tokens, each times its weight, of a function of the target's log-probability; as `cross_entropy`.

    `loss` gives the function's values and slopes; weights [M] hold whatever the sum is to be divided by.
    """
    _check(hidden, head, temperature, targets)
    transform = LogitTransform(head.soft_cap, temperature)

    def losses(raw: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        return of_likelihood(raw, targets[rows], rows, shares, transform, loss)

    return _walk(hidden, head, losses, (targets >= 0, weights, 1), Walk())


def distill(
    hidden: Tensor,
    head: Head,
    teacher: Teacher,
    count: float,
    divergence: Divergence = ForwardKL(),
    *,
    counted: Tensor | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    blend: Blend | None = None,
    walk: Walk = Walk(),
) -> Tensor:
    """Sum over tokens of the divergence from a teacher in nats, divided by count; gradients for the student alone.

    Args:
        hidden: the student's, [M, D].
        head: the student's.
        teacher: for the same M tokens.
        count: tokens of the whole step, over all its parts.
        divergence: with a `SampledTeacher` forward KL only.
        counted: bool [M], tokens that count; None: all.
        temperature: what the logits of both are divided by. The loss is not multiplied by its square.
        weights: [M], what single tokens count for; None: 1.
        blend: cross-entropy to be mixed in.

    Raises:
        UsageError: shapes do not fit, the temperature is not positive, or draws are to estimate another divergence.
    """
    live = live_ones(teacher)
    for per_token in [one.hidden for one in live] or [teacher.ids]:  # type: ignore[union-attr]
        _check(hidden, head, temperature, per_token)
    losses = _chunk_loss(teacher, divergence, head, temperature, product_dtype(hidden))
    if blend is not None:
        losses = _blended(losses, blend, LogitTransform(head.soft_cap))
    if counted is None:
        counted = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    heads = 1 + bool(live) + (blend is not None) + (MIXED_WIDTH if len(live) > 1 else 0)
    return _walk(hidden, head, losses, (counted, weights, count), walk, heads)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What `linear` would compute in: autocast's dtype where that is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunk_rows(tokens: int, token_bytes: int, budget: int) -> int:
    """Tokens of a chunk when logits take so many bytes a token: chunks as few as the budget allows, and alike.

    Alike, because products with a few last tokens would read all of the weight for them. In steps of 16, which
    the products prefer, unless the budget is for less; at least one.
    """
    most = max(1, budget // token_bytes)
    most = most if most < 16 else most // 16 * 16
    chunks = max(1, math.ceil(tokens / most))
    return max(1, min(most, math.ceil(tokens / chunks / 16) * 16))


def _check(hidden: Tensor, head: Head, temperature: float, per_token: Tensor) -> None:
    """Raise what `cross_entropy` and `distill` say."""
    what = "this head loss cannot be computed"
    if temperature <= 0:
        raise UsageError(what, f"temperature {temperature} is not positive", "1 leaves the distribution as it is")
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        shapes = f"hidden states {list(hidden.shape)} for a head {list(head.weight.shape)}"
        raise UsageError(what, shapes, "they are [tokens, hidden size] and [vocabulary, hidden size]")
    if len(per_token) != len(hidden):
        raise UsageError(what, f"{len(per_token)} targets for {len(hidden)} tokens", "give one for each token")


def _chunk_loss(
    teacher: Teacher,
    divergence: Divergence,
    head: Head,
    temperature: float,
    dtype: torch.dtype,
) -> ChunkLoss:
    """What a chunk's logits are held against."""
    transform = LogitTransform(head.soft_cap, temperature)
    if live := live_ones(teacher):
        for one in live:
            if len(one.head.weight) != len(head.weight):
                sizes = f"the teacher knows {len(one.head.weight)} ids, the student {len(head.weight)}"
                raise UsageError("these two cannot be compared", sizes, "distil between models of one tokenizer")
        shares = teacher.shares if isinstance(teacher, MixedTeachers) else (1.0,)
        return LiveLoss(live, shares, divergence, transform, dtype)
    if isinstance(teacher, TopKTeacher):
        return lambda raw, rows, shares: against_top_k(raw, teacher.rows(rows), shares, divergence, transform)
    assert isinstance(teacher, SampledTeacher)
    if isinstance(divergence, ForwardKL):
        return lambda raw, rows, shares: against_draws(raw, teacher.rows(rows), shares, transform)
    raise UsageError(
        "draws cannot estimate this divergence", "only the forward KL is linear in the teacher", "store the top k"
    )


def _blended(losses: ChunkLoss, blend: Blend, transform: LogitTransform) -> ChunkLoss:
    """Both losses of a chunk, and the sum of their gradients."""

    def both(raw: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        other = raw.clone()
        entropies = blend.kind.value_and_logit_gradient(other, blend.targets[rows], shares * blend.share, transform)
        values = losses(raw, rows, shares * (1 - blend.share)) + entropies
        raw += other
        return values

    return both


def _walk(
    hidden: Tensor,
    head: Head,
    losses: ChunkLoss,
    tokens: tuple[Tensor, Tensor | None, float],
    walk: Walk,
    heads: int = 1,
) -> Tensor:
    """The loss over the tokens that count (bool [M]), with weights [M] or None, divided by the count."""
    counted, weights, count = tokens
    rows = counted.nonzero()[:, 0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shares = torch.ones(len(rows), dtype=wide, device=hidden.device) if weights is None else weights[rows].to(wide)
    dtype = product_dtype(hidden)
    size = chunk_rows(len(rows), len(head.weight) * dtype.itemsize * heads, walk.chunk_bytes)
    plan = _Plan(losses, rows, shares / count, size, dtype, walk.weight_gradient)
    loss: Tensor = _HeadLoss.apply(hidden, head.weight, plan)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class _Plan:
    """What the walk needs besides the two tensors that have gradients: rows int64 [R], shares [R]."""

    losses: ChunkLoss
    rows: Tensor
    shares: Tensor
    size: int
    dtype: torch.dtype
    weight_gradient: torch.dtype | None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        """The loss; keeps the gradients for `backward`."""
        with torch.autocast(hidden.device.type, enabled=False):
            loss, ctx.hidden_gradient, ctx.weight_gradient = _walk_chunks(hidden, weight, plan, ctx.needs_input_grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The kept gradients times that of the loss, in place: they are handed over, not copied."""
        gradients = ctx.hidden_gradient, ctx.weight_gradient
        ctx.hidden_gradient = ctx.weight_gradient = None
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("a head loss can go backward only once: its gradients were handed over")
        if grad_output.item() != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        return gradients[0], gradients[1], None


def _walk_chunks(
    hidden: Tensor, weight: Tensor, plan: _Plan, needed: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss float64, gradient of hidden and gradient of weight, chunk by chunk; no gradient where none is needed."""
    matrix = weight if weight.dtype is plan.dtype else large(torch.empty_like(weight, dtype=plan.dtype)).copy_(weight)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    towards_hidden = torch.zeros_like(hidden) if needed[0] else None
    towards_weight = _WeightGradient(matrix, weight, plan.weight_gradient) if needed[1] else None
    buffer = large(matrix.new_empty(min(plan.size, len(plan.rows)), len(matrix)))
    for rows, shares in zip(plan.rows.split(plan.size), plan.shares.split(plan.size), strict=True):
        part, raw = hidden[rows].to(plan.dtype), buffer[: len(rows)]
        torch.mm(part, matrix.t(), out=raw)
        total += plan.losses(raw, rows, shares).sum(dtype=torch.float64)
        if towards_hidden is not None:
            towards_hidden[rows] = torch.mm(raw, matrix).to(hidden.dtype)
        if towards_weight is not None:
            towards_weight.add(raw, part)
    del buffer, raw  # before the sum is converted, which takes memory of its own
    gradient = None if towards_weight is None else towards_weight.finished(weight)
    return total.to(plan.shares.dtype), towards_hidden, gradient


class _WeightGradient:
    """The sum over chunks of (gradient of logits)^T (hidden states), [V, D], in blocks of the vocabulary.

    A product of bfloat16 comes out in bfloat16; adding those up in bfloat16 would lose what later chunks bring, so
    the sum is float32. A block's product is added at once, so that no second matrix of this size is needed.
    """

    def __init__(self, matrix: Tensor, weight: Tensor, dtype: torch.dtype | None) -> None:
        dtype = dtype or torch.promote_types(matrix.dtype, torch.float32)
        self.result = large(torch.empty_like(weight)) if dtype is weight.dtype else None
        if self.result is None:
            self.sums = [large(torch.empty_like(block, dtype=dtype)) for block in matrix.split(BLOCK)]
        else:
            self.sums = list(self.result.split(BLOCK))
        self.product = None if dtype is matrix.dtype else torch.empty_like(matrix[:BLOCK])
        self.started = False

    def add(self, raw: Tensor, part: Tensor) -> None:
        """One more chunk: gradient of logits [C, V], hidden states [C, D]."""
        for logits, total in zip(raw.split(BLOCK, dim=1), self.sums, strict=True):
            if self.product is None:
                torch.addmm(total, logits.t(), part, beta=int(self.started), out=total)  # beta 0 reads no sum
                continue
            product = torch.mm(logits.t(), part, out=self.product[: len(total)])
            if not self.started:
                total.copy_(product)
            elif not add_in_place(total, product):
                total += product
        self.started = True

    def finished(self, weight: Tensor) -> Tensor:
        """The sum, like the weight. Where that is another dtype, each block goes once it is converted."""
        if self.result is not None:
            return self.result
        result = large(torch.empty_like(weight))
        for block in result.split(BLOCK):
            block.copy_(self.sums.pop(0))
        return result
