"""Sampling steps on logits whose answer is known."""

import math
from typing import Any

import pytest
import torch

from cabochon.base.errors import UsageError
from cabochon.generate.sampling import SamplingParams, describe, penalize, pick, sample

NONE = torch.tensor([], dtype=torch.long)


def draw_many(logits: list[float], n: int = 2000, **settings: Any) -> dict[int, float]:
    params, draw = SamplingParams(**settings), torch.Generator().manual_seed(0)
    tokens = [sample(torch.tensor(logits), params, NONE, NONE, draw) for _ in range(n)]
    return {t: tokens.count(t) / n for t in set(tokens)}


def test_greedy_takes_the_largest() -> None:
    assert draw_many([0.0, 2.0, 1.0]) == {1: 1.0}


def test_draws_follow_the_probabilities() -> None:
    shares = draw_many([math.log(1), math.log(3), math.log(6)], temperature=1.0)
    assert shares[0] == pytest.approx(0.1, abs=0.03) and shares[2] == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.85}, {"min_p": 0.3}, {"logit_bias": {0: -math.inf}}])
def test_what_is_cut_off_never_comes(settings: dict[str, Any]) -> None:
    assert set(draw_many([math.log(1), math.log(3), math.log(6)], temperature=1.0, **settings)) == {1, 2}


def test_bias_can_force_a_token() -> None:
    assert draw_many([0.0, 5.0, 1.0], logit_bias={2: 100.0}) == {2: 1.0}


def test_presence_counts_once_and_frequency_each_time() -> None:
    generated = torch.tensor([1, 1, 2])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = penalize(torch.zeros(4), params, torch.tensor([3]), generated)
    assert got.tolist() == [0.0, -1.0, -0.75, 0.0]


@pytest.mark.parametrize("settings", [{"top_p": 5e-324}, {"top_p": 1e-40, "top_k": 2}, {"min_p": 1.0, "top_p": 1e-50}])
def test_the_likeliest_is_always_left(settings: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, **settings)
    logits = torch.tensor([3.0, 2.0, -1.0, 5.0])
    assert sample(logits, params, [0], [], torch.Generator().manual_seed(1)) == 3


@pytest.mark.parametrize("penalty", [1e-30, 1e-39, 5e-324])
def test_a_penalty_that_overflows_leaves_something_to_draw_from(penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=1.0)
    logits = torch.tensor([3.0, 2.0, -1.0, 5.0])
    assert sample(logits, params, [0, 1], [2], torch.Generator().manual_seed(1)) in (0, 1)
    logits = torch.tensor([-torch.inf, -torch.inf, -1.0, -2.0])  # what a constraint forbids is among what was seen
    assert sample(logits, params, [0, 1], [2], torch.Generator().manual_seed(1)) == 2


def test_the_input_logits_stay_as_they_are() -> None:
    logits = torch.randn(9)
    before = logits.clone()
    params = SamplingParams(
        temperature=1.0, top_k=3, repetition_penalty=2.0, frequency_penalty=1.0, logit_bias={0: 1.0}
    )
    sample(logits, params, torch.tensor([1]), torch.tensor([2]), torch.Generator())
    assert torch.equal(logits, before)


def test_describe_reports_true_log_probabilities() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    told = describe(logits, 0, 2)
    assert told.logprob == pytest.approx(logits.log_softmax(0)[0].item())
    assert [i for i, _ in told.top] == [1, 2]
    assert describe(logits, 1, 0).top == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0}, {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"n": 0},
        {"presence_penalty": math.inf}, {"frequency_penalty": math.nan}, {"stop": ("",)}, {"seed": -1},
        {"logprobs": -1}, {"logit_bias": {1: math.nan}},
    ],
)  # fmt: skip
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} cannot be"):
        SamplingParams(**settings)


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
def test_the_ends_of_a_distribution(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(share, dtype=torch.float64))
    likely = torch.tensor([0.0, 1e-30, 0.7, 0.3, 0.0])
    assert pick(likely, torch.Generator()) == (1 if share == 0 else 3)


@pytest.mark.parametrize("size", [5, 1024, 3000, 4096])
def test_a_token_stands_at_its_share(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the vocabulary change nothing: the token is the first whose running sum is above the share."""
    draw = torch.Generator().manual_seed(size)
    probabilities = torch.rand(size, generator=draw).pow(8)
    probabilities[::3] = 0
    sums = probabilities.double().cumsum(0) / probabilities.double().sum()
    for share in [0.0, *torch.rand(200, generator=draw, dtype=torch.float64).tolist()]:
        monkeypatch.setattr(torch, "rand", lambda *_, share=share, **__: torch.tensor(share, dtype=torch.float64))
        token = pick(probabilities, torch.Generator())
        assert token == int(torch.searchsorted(sums, torch.tensor(share).double(), right=True))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2**-53, dtype=torch.float64))
    assert pick(probabilities, torch.Generator()) == int(probabilities.nonzero()[-1])
