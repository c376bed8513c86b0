"""Guesses, and that a sampled token is distributed as if nothing had been guessed."""

import dataclasses
import random

import pytest
import torch

from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams, generator, shares
from cabochon.generate.speculate import Draft, DraftModel, PromptLookup, accept
from support import SMALL, small_model

DRAWS = 20_000


def distribution(seed: int, size: int = 7) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic; with six degrees of freedom above 33 once in 100,000 runs of a correct sampler."""
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("guessed_well", [True, False])
def test_an_accepted_or_replaced_guess_has_the_models_distribution(certain: bool, guessed_well: bool) -> None:
    logits, params = distribution(1), SamplingParams(temperature=0.8)
    wanted = shares(logits, params)
    wanted = wanted / wanted.sum()
    q = torch.softmax(distribution(1 if guessed_well else 2) * 0.5, 0)
    draw = torch.Generator().manual_seed(5)
    counts, stood = torch.zeros(7), 0
    for _ in range(DRAWS):
        guess = int(wanted.argmax()) if certain else int(torch.multinomial(q, 1, generator=draw))
        draft = Draft((guess,), None if certain else (q,))
        token, stands = accept(logits, params, draft, 0, draw)
        assert stands == (token == guess) or not certain
        counts[token] += 1
        stood += stands
    assert chi_square(counts, wanted * DRAWS) < 33
    expected_share = float(wanted.max()) if certain else float(torch.minimum(wanted, q).sum())
    assert stood / DRAWS == pytest.approx(expected_share, abs=0.02)


def test_the_check_notices_a_sampler_that_always_keeps_the_guess() -> None:
    logits, params = distribution(1), SamplingParams(temperature=0.8)
    wanted = shares(logits, params) / shares(logits, params).sum()
    q = torch.softmax(distribution(2) * 0.5, 0)
    drawn = torch.multinomial(q, DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    assert chi_square(drawn.bincount(minlength=7).float(), wanted * DRAWS) > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_sampled_answers_are_distributed_as_without_speculation(kind: str) -> None:
    """The second and third token of many answers, drawn with and without guessing, through the whole engine."""
    config = dataclasses.replace(SMALL, vocab_size=110, head_dim=16, hidden_size=32)
    model, other = small_model(config, seed=1, size=0.2), small_model(config, seed=2, size=0.2)
    params = SamplingParams(max_new_tokens=3, temperature=1.0, top_k=4)
    prompt = [9, 10, 11, 12, 9, 10, 11, 12, 9, 10]

    def pairs(speculator: object) -> dict[tuple[int, int], int]:
        engine, counts = Engine(model, frozenset(), EngineConfig(max_requests=50), speculator), {}
        for first in range(0, 3000, 50):
            requests = [engine.submit(prompt, dataclasses.replace(params, seed=first + i)) for i in range(50)]
            while not engine.idle:
                engine.step()
            for request in requests:
                key = tuple(request.generated[1:])
                counts[key] = counts.get(key, 0) + 1
        return counts

    plain, guessed = pairs(None), pairs(DraftModel(other, model) if kind == "draft" else PromptLookup())
    keys = sorted(plain.keys() | guessed.keys())
    a, b = (torch.tensor([float(counts.get(k, 0)) for k in keys]) for counts in (plain, guessed))
    statistic = float(((a - b) ** 2 / (a + b)).sum())  # chi-square of two samples of one size
    freedom = len(keys) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def request_for(tokens: list[int]) -> Request:
    return Request(tokens, SamplingParams(), 100, generator(0, 0))


def test_lookup_finds_what_followed_the_longest_last_run() -> None:
    lookup = PromptLookup(ahead=3)
    assert lookup.propose(request_for([1, 2, 3, 4, 5, 9, 9, 2, 3]), 9).tokens == (4, 5, 9)
    assert lookup.propose(request_for([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3]), 9).tokens == (4, 7, 2)
    assert lookup.propose(request_for([1, 2, 3, 4]), 9).tokens == ()
    assert lookup.propose(request_for([5, 5, 5, 5]), 1).tokens == (5,)


def test_lookup_follows_an_answer_and_forgets_it() -> None:
    lookup, request = PromptLookup(), request_for([1, 2, 3, 4])
    assert lookup.propose(request, 5).tokens == ()
    request.generated += [1, 2]
    assert lookup.propose(request, 5).tokens == (3, 4, 1)
    lookup.release(request)
    assert not lookup._seen


def test_lookup_equals_a_search_from_the_end() -> None:
    draw = random.Random(1)
    for _ in range(200):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(1, 40))]
        lookup = PromptLookup(ahead=3, longest=4, shortest=2)
        expected: tuple[int, ...] = ()
        for size in (4, 3, 2):
            places = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
            if places and len(tokens) > size:
                expected = tuple(tokens[places[-1] : places[-1] + 3])
                break
        assert lookup.propose(request_for(tokens), 3).tokens == expected
