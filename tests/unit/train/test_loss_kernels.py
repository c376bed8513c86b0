"""The compiled head losses against their plain twins."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cabochon.model.kernels import losses, native
from cabochon.train.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    TotalVariation,
    kernel_kind,
)
from cabochon.train.losses.logits import LogitTransform, log_normaliser, normaliser_of_rest, write_gradient
from cabochon.train.losses.teachers import against_live

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "compiled")
BF16_STEP = 2**-7  # two roundings of nearly the same number differ by this share of it at most
DIVERGENCES = [ForwardKL(), ReverseKL(), TotalVariation(), *(JensenShannon(b) for b in (0.0, 1e-3, 0.5, 0.9, 1.0))]

transforms = st.builds(LogitTransform, st.sampled_from([None, 30.0]), st.sampled_from([1.0, 0.5, 2.0]))


@st.composite
def chunks(draw: st.DrawFn) -> Callable[[int], Tensor]:
    """A function from a number to raw logits [C, V], which lie far beyond the cap at times."""
    shape, seed = (draw(st.integers(1, 5)), 16 * draw(st.integers(1, 200))), draw(st.integers(0, 10**6))
    dtype, spread = draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.sampled_from([0.01, 3, 40]))

    def make(number: int) -> Tensor:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + number)) * spread).to(dtype)

    return make


def plainly(call: Callable[[], Any]) -> Any:
    """The result of a call without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return call()


def largest_logit(raw: Tensor, transform: LogitTransform) -> float:
    return transform.apply(raw).abs().max().item()


def close(found: Tensor, wanted: Tensor, largest: float) -> None:
    """Gradients agree to float32, or to one step of bfloat16.

    A logit z in float32 is known to 1e-7 of itself or of the cap, so its exponential is, and divergences multiply by
    differences of logits once more.
    """
    step = BF16_STEP if found.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.float(), wanted.float(), rtol=step, atol=1e-5 + 2e-7 * largest * (1 + largest))


@settings(max_examples=100, deadline=None)
@given(chunk=chunks(), transform=transforms)
@torch.no_grad()
def test_normalisers_equal_their_twins(chunk: Any, transform: LogitTransform) -> None:
    raw = chunk(0)
    assert losses.log_normaliser(raw, transform.soft_cap, transform.temperature) is not None
    torch.testing.assert_close(
        log_normaliser(raw, transform), plainly(lambda: log_normaliser(raw, transform)), rtol=1e-6, atol=2e-5
    )
    ids = torch.stack([torch.randperm(raw.shape[1])[:3] for _ in raw])
    rest = normaliser_of_rest(raw, ids, transform)
    torch.testing.assert_close(rest, plainly(lambda: normaliser_of_rest(raw, ids, transform)), rtol=1e-6, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(chunk=chunks(), transform=transforms)
@torch.no_grad()
def test_gradients_of_the_softmax_equal_their_twins(chunk: Any, transform: LogitTransform) -> None:
    raw = chunk(0)
    parts = log_normaliser(raw, transform), torch.linspace(-1, 2, len(raw)), torch.linspace(0, 0.1, len(raw))
    ids, at_ids = torch.zeros(len(raw), 1, dtype=torch.int64), torch.full((len(raw), 1), 0.7)

    def gradient() -> Tensor:
        out = raw.clone()
        write_gradient(out, transform, parts, ids, at_ids)
        return out

    close(gradient(), plainly(gradient), largest_logit(raw, transform))


@settings(max_examples=100, deadline=None)
@given(chunk=chunks(), transform=transforms, cap=st.sampled_from([None, 30.0]), divergence=st.sampled_from(DIVERGENCES))
@torch.no_grad()
def test_divergences_equal_their_twins(
    chunk: Any, transform: LogitTransform, cap: float | None, divergence: Divergence
) -> None:
    teacher, weights = chunk(1), torch.linspace(0.5, 2, len(chunk(0)))
    assert kernel_kind(divergence) is not None

    def both() -> tuple[Tensor, Tensor]:
        raw = chunk(0)
        values = against_live(raw, teacher, weights, divergence, transform, cap)
        return values, raw

    (values, gradient), (plain_values, plain_gradient) = both(), plainly(both)
    largest = max(largest_logit(raw, transform) for raw in (chunk(0), teacher))
    close(values, plain_values, largest)
    if isinstance(divergence, TotalVariation):
        # Where P and Q agree, the sign of their difference is that of rounding errors.
        log_p = LogitTransform(cap, transform.temperature).apply(teacher).log_softmax(1)
        log_q = transform.apply(chunk(0)).log_softmax(1)
        assume(not ((log_p - log_q).abs() < 1e-3).logical_and(log_q > -12).any())
    close(gradient, plain_gradient, largest)


@torch.no_grad()
def test_small_numbers_are_not_lost_in_a_long_sum() -> None:
    raw = torch.full((1, 256_000), -16.0)
    raw[0, 0] = 0
    exact = math.log1p(255_999 * math.exp(-16))
    assert log_normaliser(raw, LogitTransform(None)).item() == pytest.approx(
        exact, rel=1e-3
    )  # each of them rounded away: 0


def test_what_the_kernels_do_not_know_is_left_to_the_twins() -> None:
    odd, wide = torch.zeros(2, 17), torch.zeros(2, 16, dtype=torch.float64)
    with torch.no_grad():
        assert losses.log_normaliser(odd, 30.0, 1.0) is None and losses.log_normaliser(wide, 30.0, 1.0) is None
    assert losses.log_normaliser(torch.zeros(2, 16, requires_grad=True), 30.0, 1.0) is None

    class Other:
        def value_and_logit_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
            return log_q.sum(1), log_p

    assert kernel_kind(Other()) is None
