"""Hundreds of requests of every kind through one engine: each is answered as the plain loop answers it alone."""

import dataclasses
import random

import pytest

from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.plain import PlainLoop
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.generate.speculate import DraftModel, PromptLookup, Speculator
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import page_bytes, pages_for
from support import SMALL, small_model

CONFIG = dataclasses.replace(SMALL, head_dim=32, sliding_window=50, max_position=400)
STOP = frozenset({1})
REQUESTS = 300


def random_request(draw: random.Random, known: list[list[int]]) -> tuple[list[int], SamplingParams]:
    """Of any length; often a continuation of an earlier one; greedy, sampled, penalised."""
    prompt = [draw.randrange(2, CONFIG.vocab_size) for _ in range(draw.choice((1, 3, 20, 60, 150)))]
    if known and draw.random() < 0.5:
        old = draw.choice(known)
        prompt = old[: draw.randrange(1, len(old) + 1)][:250] + prompt[:30]
    params = SamplingParams(
        max_new_tokens=draw.choice((1, 5, 40, 90)),
        temperature=draw.choice((0, 0, 0.8)),
        top_k=draw.choice((0, 10)),
        top_p=draw.choice((1.0, 0.9)),
        repetition_penalty=draw.choice((1.0, 1.2)),
        seed=draw.randrange(1000),
    )
    return prompt, params


def expected(model: Gemma2, prompt: list[int], params: SamplingParams) -> list[int]:
    loop, tokens = PlainLoop(model, [prompt], [params], STOP), []
    while loop.live:
        tokens += [sampled.token for sampled in loop.step()]
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "lookup", "draft"])
def test_a_busy_engine(kind: str) -> None:
    model = small_model(CONFIG, seed=5, size=0.15)
    draft = small_model(dataclasses.replace(CONFIG, num_layers=1), seed=5, size=0.15)
    speculators: dict[str, Speculator | None] = {
        "none": None, "lookup": PromptLookup(), "draft": DraftModel(draft, model)
    }  # fmt: skip
    draw = random.Random(kind)
    memory = 4 * pages_for(CONFIG, CONFIG.max_position) * page_bytes(CONFIG, model.cache_dtype)
    config = EngineConfig(cache_bytes=memory, max_requests=9, chunk=70, busy_chunk=20)
    engine = Engine(model, STOP, config, speculators[kind])
    open_requests: list[Request] = []
    ended: list[Request] = []
    known: list[list[int]] = []
    submitted = 0
    while submitted < REQUESTS or not engine.idle:
        if submitted < REQUESTS and draw.random() < 0.3:
            open_requests.append(engine.submit(*random_request(draw, known)))
            submitted += 1
        if open_requests and draw.random() < 0.03:
            engine.cancel(draw.choice(open_requests))
        engine.step()
        done = [r for r in open_requests if r.done]
        open_requests = [r for r in open_requests if not r.done]
        ended += done
        known += [r.tokens for r in done]
    assert len(ended) == REQUESTS
    assert sum(r.reused > 0 for r in ended) > REQUESTS / 10
    assert sum(not r.events or r.events[-1].last is None for r in ended) > 5  # cancelled on the way
    for request in ended:
        if kind != "none" and request.params.temperature:
            continue  # equal in distribution alone: test_speculate.py
        whole = expected(model, request.prompt, request.params)
        cancelled = not request.events or request.events[-1].last is None
        assert request.generated == (whole[: len(request.generated)] if cancelled else whole)
    engine.prefixes.clear()
    assert engine.pool.free == engine.pool.pages
    if isinstance(engine.speculator, DraftModel):
        assert engine.speculator.pool.free == engine.speculator.pool.pages
