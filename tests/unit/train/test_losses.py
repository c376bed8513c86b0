"""The head losses against plain autograd in float64: value and every gradient, chunk by chunk or at once."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy as plain_cross_entropy
from torch.nn.functional import kl_div

from cabochon.base.errors import UsageError
from cabochon.data.pack import IGNORED
from cabochon.train.losses.cross_entropy import CrossEntropy
from cabochon.train.losses.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TotalVariation
from cabochon.train.losses.fused import Walk, cross_entropy, distill
from cabochon.train.losses.teachers import Head, LiveTeacher, SampledTeacher, TopKTeacher

DIVERGENCES = [ForwardKL(), ReverseKL(), TotalVariation(), *(JensenShannon(b) for b in (0.0, 0.1, 0.5, 0.9, 1.0))]


@dataclass
class Problem:
    """Hidden states and heads of a student and a teacher, targets with holes, and how to compute."""

    hidden: Tensor
    head: Head
    teacher: LiveTeacher
    targets: Tensor
    weights: Tensor | None
    temperature: float
    chunk: int

    @property
    def walk(self) -> Walk:
        itemsize = self.hidden.dtype.itemsize
        return Walk(chunk_bytes=self.chunk * len(self.head.weight) * itemsize)

    @property
    def counted(self) -> Tensor:
        return self.targets >= 0

    def logits(self) -> Tensor:
        return finished(self.hidden, self.head, self.temperature)

    def teacher_logits(self) -> Tensor:
        return finished(self.teacher.hidden, self.teacher.head, self.temperature)

    def summed(self, losses: Tensor, count: float) -> Tensor:
        """What the fused loss should be, from plain losses [M]."""
        weights = torch.ones_like(losses) if self.weights is None else self.weights
        return (losses * weights)[self.counted].sum() / count


def finished(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    logits = hidden @ head.weight.T
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits / temperature


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Problem:
    """Raw logits have a spread of up to 60, twice the cap."""
    seed, tokens, vocab = draw(st.integers(0, 10**6)), draw(st.integers(1, 20)), draw(st.integers(2, 70))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    spreads = draw(st.sampled_from([0.3, 5, 60])), draw(st.sampled_from([0.3, 5, 60]))
    caps = draw(st.sampled_from([None, 30.0])), draw(st.sampled_from([None, 30.0]))
    states = [normal(tokens, size) * spread / math.sqrt(size) for size, spread in zip(sizes, spreads, strict=True)]
    heads = [Head(normal(vocab, size), cap) for size, cap in zip(sizes, caps, strict=True)]
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = IGNORED
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    temperature = draw(st.sampled_from([1.0, 0.5, 2.0]))
    return Problem(
        states[0].requires_grad_(),
        Head(heads[0].weight.requires_grad_(), heads[0].soft_cap),
        LiveTeacher(states[1], heads[1]),
        targets,
        weights,
        temperature,
        draw(st.integers(1, 25)),
    )


def agree(problem: Problem, loss: Tensor, expected: Tensor, tolerance: float = 1e-6, factor: float = 1.7) -> None:
    """Both losses, and their gradients when multiplied by a factor."""
    inputs = problem.hidden, problem.head.weight
    found = torch.autograd.grad(loss * factor, inputs)
    wanted = torch.autograd.grad(expected * factor, inputs)
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance, check_dtype=False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# One target for each token


@settings(max_examples=100, deadline=None)
@given(problem=problems(), smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 1e-2]))
def test_cross_entropy_is_that_of_autograd(problem: Problem, smoothing: float, z_loss: float) -> None:
    loss = cross_entropy(
        problem.hidden, problem.head, problem.targets, 7, CrossEntropy(smoothing, z_loss),
        temperature=problem.temperature, weights=problem.weights, walk=problem.walk,
    )  # fmt: skip
    logits = problem.logits()
    plain = plain_cross_entropy(logits, problem.targets, reduction="none", label_smoothing=smoothing)
    agree(problem, loss, problem.summed(plain + z_loss * logits.logsumexp(1) ** 2, 7))


# A live teacher


def plain_divergence(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The formulas of the papers, for autograd."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return kl_div(b, a, reduction="none", log_target=True).sum(1)

    match divergence:
        case ForwardKL() | JensenShannon(beta=0.0):
            return kl(log_p, log_q)
        case ReverseKL() | JensenShannon(beta=1.0):
            return kl(log_q, log_p)
        case JensenShannon(beta=beta):
            log_m = torch.stack([log_p + math.log(beta), log_q + math.log(1 - beta)]).logsumexp(0)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return (log_p.exp() - log_q.exp()).abs().sum(1) / 2


@settings(max_examples=100, deadline=None)
@given(problem=problems(), divergence=st.sampled_from(DIVERGENCES))
def test_divergences_are_those_of_autograd(problem: Problem, divergence: Divergence) -> None:
    loss = distill(
        problem.hidden, problem.head, problem.teacher, 3, divergence,
        counted=problem.counted, temperature=problem.temperature, weights=problem.weights, walk=problem.walk,
    )  # fmt: skip
    log_q, log_p = problem.logits().log_softmax(1), problem.teacher_logits().log_softmax(1)
    agree(problem, loss, problem.summed(plain_divergence(divergence, log_p, log_q), 3))


@given(problem=problems(), beta=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_a_teacher_that_agrees_leaves_nothing_to_learn(problem: Problem, beta: float) -> None:
    teacher = LiveTeacher(problem.hidden.detach(), Head(problem.head.weight.detach(), problem.head.soft_cap))
    for divergence in (ForwardKL(), ReverseKL(), TotalVariation(), JensenShannon(beta)):
        loss = distill(problem.hidden, problem.head, teacher, 1, divergence, temperature=problem.temperature)
        gradients = torch.autograd.grad(loss, (problem.hidden, problem.head.weight))
        assert all(abs(part).max() < 1e-9 for part in (loss, *gradients))


# A stored teacher


def stored(problem: Problem, k: int) -> tuple[TopKTeacher, Tensor]:
    """The k likeliest, and log-probabilities of all."""
    log_p = problem.teacher_logits().log_softmax(1)
    top = log_p.exp().topk(min(k, log_p.shape[1]), dim=1)
    return TopKTeacher(top.indices, top.values), log_p


@settings(max_examples=100, deadline=None)
@given(problem=problems(), divergence=st.sampled_from(DIVERGENCES), k=st.integers(1, 5))
def test_buckets_are_those_of_autograd(problem: Problem, divergence: Divergence, k: int) -> None:
    teacher, _ = stored(problem, min(k, len(problem.head.weight) - 1))
    loss = distill(
        problem.hidden, problem.head, teacher, 3, divergence,
        counted=problem.counted, temperature=problem.temperature, weights=problem.weights, walk=problem.walk,
    )  # fmt: skip

    logits = problem.logits()
    rest = logits.scatter(1, teacher.ids, -math.inf).logsumexp(1, keepdim=True)
    log_q = torch.cat([logits.gather(1, teacher.ids), rest], 1).log_softmax(1)
    p = teacher.probabilities
    log_p = torch.cat([p, (1 - p.sum(1, keepdim=True)).clamp_min(2**-52)], 1).log()
    agree(problem, loss, problem.summed(plain_divergence(divergence, log_p, log_q), 3))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), k=st.integers(1, 5))
def test_buckets_never_count_more_than_the_vocabulary(problem: Problem, k: int) -> None:
    teacher, log_p = stored(problem, min(k, len(problem.head.weight) - 1))
    loss = distill(problem.hidden, problem.head, teacher, 1, temperature=problem.temperature)
    whole = plain_divergence(ForwardKL(), log_p, problem.logits().log_softmax(1)).sum()
    assert loss <= whole * (1 + 1e-9) + 1e-9


@settings(max_examples=100, deadline=None)
@given(problem=problems(), divergence=st.sampled_from(DIVERGENCES))
def test_buckets_for_every_id_are_the_vocabulary(problem: Problem, divergence: Divergence) -> None:
    """With one id less than there are, the rest is the last id and nothing is lost."""
    teacher, _ = stored(problem, len(problem.head.weight) - 1)
    settings = dict(counted=problem.counted, temperature=problem.temperature, weights=problem.weights)
    loss = distill(problem.hidden, problem.head, teacher, 1, divergence, walk=problem.walk, **settings)
    whole = distill(problem.hidden, problem.head, problem.teacher, 1, divergence, **settings)
    if (1 - teacher.probabilities.sum(1)).min() > 1e-6:  # stored probabilities know their rest to 1e-16
        agree(problem, loss, whole)
    teacher, log_p = stored(problem, len(problem.head.weight))
    loss = distill(problem.hidden, problem.head, teacher, 1, divergence, walk=problem.walk, **settings)
    whole = distill(problem.hidden, problem.head, problem.teacher, 1, divergence, **settings)
    if log_p.min() > -600:  # smaller ones are stored as 0
        agree(problem, loss, whole)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), k=st.integers(1, 6), seed=st.integers(0, 100))
def test_draws_are_weighed_cross_entropies(problem: Problem, k: int, seed: int) -> None:
    """Ids that are drawn twice count twice."""
    log_p, generator = problem.teacher_logits().log_softmax(1), torch.Generator().manual_seed(seed)
    ids = torch.randint(log_p.shape[1], (len(log_p), k), generator=generator)
    shares = torch.rand(len(log_p), k, generator=generator, dtype=log_p.dtype)
    teacher = SampledTeacher(ids, log_p.exp().gather(1, ids), shares)
    loss = distill(
        problem.hidden, problem.head, teacher, 3,
        counted=problem.counted, temperature=problem.temperature, weights=problem.weights, walk=problem.walk,
    )  # fmt: skip
    log_q = problem.logits().log_softmax(1)
    at = shares * (teacher.probabilities.log() - log_q.gather(1, ids))
    if at.isfinite().all():
        agree(problem, loss, problem.summed(at.sum(1), 3))


def test_draws_are_unbiased() -> None:
    """Over all ids at once, each weighed by its probability, the estimate is the divergence: so it is on average."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, states, other = (torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    hidden.requires_grad_(), weight.requires_grad_()
    p = finished(states, Head(other, 30.0), 1).softmax(1)
    ids = torch.arange(9).expand(9, 9)
    losses = [
        distill(hidden, Head(weight, 30.0), teacher, 9)
        for teacher in (SampledTeacher(ids, p, p), LiveTeacher(states, Head(other, 30.0)))
    ]
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_draws_estimate_no_other_divergence() -> None:
    teacher = SampledTeacher(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(UsageError, match="only the forward KL"):
        distill(torch.zeros(2, 3), Head(torch.zeros(5, 3), None), teacher, 1, ReverseKL())


# bfloat16


@settings(max_examples=100, deadline=None)
@given(problem=problems(torch.bfloat16), divergence=st.sampled_from([None, *DIVERGENCES]))
def test_bfloat16_differs_by_its_rounding(problem: Problem, divergence: Divergence | None) -> None:
    """Raw logits are rounded to 8 bits, as anywhere: 2^-8 of them, so of exp(z) its exponential; then gradients are.

    Held against float64 on the same rounded logits, what remains is the rounding of gradients: 2^-8 of the largest.
    """
    weights = None if problem.weights is None else problem.weights.float()
    count = dict(temperature=problem.temperature, weights=weights)
    if divergence is None:
        loss = cross_entropy(problem.hidden, problem.head, problem.targets, 3, walk=problem.walk, **count)
    else:
        loss = distill(
            problem.hidden, problem.head, problem.teacher, 3, divergence,
            counted=problem.counted, walk=problem.walk, **count,
        )  # fmt: skip
    found = torch.autograd.grad(loss, (problem.hidden, problem.head.weight))
    hidden, weight = problem.hidden.detach().double(), problem.head.weight.detach().double()
    raw = (problem.hidden @ problem.head.weight.T).detach().double().requires_grad_()
    teacher_raw = (problem.teacher.hidden @ problem.teacher.head.weight.T).double()
    log_q = finished(raw, Head(torch.eye(raw.shape[1], dtype=raw.dtype), problem.head.soft_cap), problem.temperature)
    identity = Head(torch.eye(raw.shape[1], dtype=raw.dtype), problem.teacher.head.soft_cap)
    log_q, log_p = log_q.log_softmax(1), finished(teacher_raw, identity, problem.temperature).log_softmax(1)
    if divergence is None:
        plain = plain_cross_entropy(log_q, problem.targets, reduction="none")
    else:
        plain = plain_divergence(divergence, log_p, log_q)
    expected = problem.summed(plain, 3)
    (towards,) = torch.autograd.grad(expected, raw)
    # A logit in float32 is known to 1e-7 of it, and divergences multiply by differences of logits once more.
    largest = max(log_p.abs().max().item(), log_q.abs().max().item())
    float32 = 1e-5 + 4e-7 * largest * (1 + largest) * (1 + max(hidden.abs().max().item(), weight.abs().max().item()))
    torch.testing.assert_close(loss.double(), expected, atol=float32, rtol=1e-5)
    for one, other in zip(found, (towards @ weight, towards.T @ hidden), strict=True):
        scale = (towards.abs() @ weight.abs()).max() if one is found[0] else (towards.abs().T @ hidden.abs()).max()
        assert (one.double() - other).abs().max() <= 3 * 2**-8 * scale + float32
