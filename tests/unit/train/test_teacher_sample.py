"""What is stored of a teacher's logits: an unbiased sample with the least variance, or the likeliest ids and a bill."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.train import teacher_sample
from cabochon.train.teacher_sample import entries


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[M, V], flat or with a few ids that have nearly everything."""
    seed, positions, vocab = draw(st.integers(0, 10**6)), draw(st.integers(1, 7)), draw(st.integers(2, 1500))
    spread = draw(st.sampled_from([0.01, 1.0, 3.0, 15.0]))
    drawn = torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return 30 * torch.tanh(drawn / 30)


@given(z=logits(), share=st.floats(0, 1), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_likeliest_and_what_they_leave_out(z: Tensor, share: float, temperature: float) -> None:
    k = max(1, round(share * z.shape[1]))
    said, totals = entries(z, k, temperature)
    p = (z.double() / temperature).softmax(1)
    top = p.topk(k).values
    assert np.allclose(said.probabilities, top, rtol=1e-4, atol=1e-12)
    assert np.allclose(p.gather(1, torch.from_numpy(said.ids)), top, rtol=1e-4, atol=1e-12)
    assert np.allclose(said.last, 1 - top.sum(1), atol=1e-5)
    # The teacher as a student would see it: the rest evenly over what is no entry.
    rest, others = 1 - top.sum(1, keepdim=True), max(1, z.shape[1] - k)
    seen = (rest / others).clamp_min(1e-300).expand_as(p).scatter(1, torch.from_numpy(said.ids), top)
    lost = (p * (p / seen).log()).sum().item() if k < z.shape[1] else 0.0
    assert totals.kl_lost == pytest.approx(lost, rel=1e-3, abs=2e-5 * len(z))
    assert totals.left_out == pytest.approx(rest.sum().item(), abs=1e-5 * len(z))
    assert totals.entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4, abs=1e-5 * len(z))
    assert (totals.tokens, totals.variance) == (len(z), 0)


@given(z=logits(), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_a_sample_keeps_the_likely_ids_and_weighs_1(z: Tensor, share: float, seed: int) -> None:
    k = max(1, round(share * (z.shape[1] - 1)))
    u = torch.rand(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    said, totals = entries(z, k, 1.0, u)
    p = z.double().softmax(1)
    weights = np.maximum(said.probabilities.astype(np.float64), said.last[:, None])
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    assert np.allclose(said.probabilities, p.gather(1, torch.from_numpy(said.ids)), rtol=1e-4, atol=1e-12)
    variance = 0.0
    for row in range(len(z)):
        t = said.last[row]
        if t > 0:  # what the threshold is: nearly certain teachers leave nothing that could be drawn
            assert (p[row] / t).clamp_max(1).sum().item() == pytest.approx(k, rel=1e-3)
        likely = set((p[row] > t * 1.001 + 1e-9).nonzero()[:, 0].tolist())
        assert likely <= set(said.ids[row].tolist()) and len(set(said.ids[row].tolist())) == k
        below = p[row][p[row] < t]
        variance += (below * (t - below)).sum().item()
    assert totals.variance == pytest.approx(variance, rel=1e-3, abs=1e-6)
    assert totals.kl_lost == 0


def test_every_id_is_drawn_as_often_as_it_is_likely() -> None:
    """Each u stands for its stretch of [0, 1): with all of them, weights add up to the probabilities themselves."""
    vocab, k, draws = 600, 16, 4000  # two blocks of ids
    z = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 3
    u = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    said, totals = entries(z.expand(draws, vocab), k, 1.0, u)
    weights = np.maximum(said.probabilities.astype(np.float64), said.last[:, None])
    mean, square = np.zeros(vocab), np.zeros(vocab)
    np.add.at(mean, said.ids.ravel(), weights.ravel() / draws)
    np.add.at(square, said.ids.ravel(), weights.ravel() ** 2 / draws)
    p = z[0].double().softmax(0).numpy()
    # An id is met in one stretch of u, or in two at the ends: off by a step or two of 1 / draws.
    assert np.abs(mean - p).max() <= 2.01 * said.last.max() / draws
    assert (square - mean**2).sum() == pytest.approx(totals.variance / draws, rel=0.02)
    # Draws with replacement have more variance, as many entries as they may take.
    assert totals.variance / draws < 0.5 * (p * (1 - p)).sum() / k


def test_a_teacher_that_is_certain_leaves_nothing_to_draw() -> None:
    z = torch.full((2, 700), -30.0)
    z[:, 3], z[:, 699] = 30.0, -29.0
    said, totals = entries(z * 10, 4, 1.0, torch.tensor([0.0, 0.999], dtype=torch.float64))
    assert said.ids[:, 0].tolist() == [3, 3] and (said.ids < 700).all()
    assert np.allclose(said.probabilities[:, 0], 1) and said.last.max() < 1e-9 and totals.entropy < 1e-9


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    z, u = torch.randn(7, 90), torch.rand(7, dtype=torch.float64)
    whole = [entries(z, 5, 1.0), entries(z, 5, 1.0, u)]
    monkeypatch.setattr(teacher_sample, "AT_ONCE", 200)
    for (said, totals), (parts, sums) in zip(whole, [entries(z, 5, 1.0), entries(z, 5, 1.0, u)], strict=True):
        assert np.array_equal(said.ids, parts.ids) and np.allclose(said.last, parts.last)
        assert math.isclose(totals.entropy, sums.entropy, rel_tol=1e-6) and totals.tokens == sums.tokens == 7


def test_logits_that_are_no_numbers_are_refused() -> None:
    z = torch.zeros(3, 9)
    z[1, 4] = float("nan")
    with pytest.raises(BadInput, match="says nothing"):
        entries(z, 2, 1.0)
