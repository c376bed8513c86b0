"""The reference loop: rows that do not disturb each other, seeds, ends."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.generate.plain import PlainLoop, Sampled
from cabochon.generate.sampling import SamplingParams
from support import SMALL, random_ids, small_model

MODEL = small_model(seed=1)


def run(
    prompts: list[list[int]], params: list[SamplingParams], stop: frozenset[int] = frozenset()
) -> list[list[Sampled]]:
    loop = PlainLoop(MODEL, prompts, params, stop)
    rows: list[list[Sampled]] = [[] for _ in loop.live]
    while loop.live:
        for sampled in loop.step():
            rows[sampled.row].append(sampled)
    return rows


def tokens(rows: list[list[Sampled]]) -> list[list[int]]:
    return [[s.token for s in row] for row in rows]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(SMALL, 1, length, seed)[0].tolist()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.floats(0, 1.5)), min_size=2, max_size=4))
def test_an_answer_does_not_depend_on_its_neighbours(requests: list[tuple[int, int, float]]) -> None:
    prompts = [prompt(length, seed) for seed, (length, _, _) in enumerate(requests)]
    params = [SamplingParams(max_new_tokens=n, temperature=t, seed=5) for _, n, t in requests]
    together = tokens(run(prompts, params))
    assert together == [tokens(run([p], [s]))[0] for p, s in zip(prompts, params, strict=True)]


def test_n_answers_are_different_and_repeatable() -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=3, n=3)
    first, again = tokens(run([prompt(4)], [params])), tokens(run([prompt(4)], [params]))
    assert first == again
    assert len({tuple(row) for row in first}) == 3
    assert tokens(run([prompt(4)], [SamplingParams(max_new_tokens=12, temperature=1.5, seed=3)]))[0] == first[0]


def test_no_seed_differs_from_run_to_run() -> None:
    params = SamplingParams(max_new_tokens=20, temperature=2.0)
    assert tokens(run([prompt(4)], [params])) != tokens(run([prompt(4)], [params]))


def test_reasons_to_end() -> None:
    greedy = tokens(run([prompt(6)], [SamplingParams(max_new_tokens=8)]))[0]
    rows = run([prompt(6)], [SamplingParams(max_new_tokens=8)], frozenset({greedy[3]}))
    cut = greedy.index(greedy[3]) + 1
    assert [s.token for s in rows[0]] == greedy[:cut]
    assert rows[0][-1].last == "stop" and all(s.last is None for s in rows[0][:-1])
    assert run([prompt(6)], [SamplingParams(max_new_tokens=2)])[0][-1].last == "length"


def test_the_context_ends_an_answer() -> None:
    rows = run([prompt(SMALL.max_position - 3)], [SamplingParams(max_new_tokens=None)])
    assert len(rows[0]) == 3 and rows[0][-1].last == "length"


def test_logprobs_are_those_of_the_uncached_model() -> None:
    start = prompt(9)
    rows = run([start], [SamplingParams(max_new_tokens=6, logprobs=2, repetition_penalty=1.5)])[0]
    whole = torch.tensor([start + [s.token for s in rows]])
    with torch.no_grad():
        expected = MODEL(whole)[0, len(start) - 1 : -1].log_softmax(-1)
    for i, sampled in enumerate(rows):
        assert sampled.logprob is not None
        assert abs(sampled.logprob.logprob - expected[i, sampled.token].item()) < 1e-4
        assert len(sampled.logprob.top) == 2
