"""Steps over tensors that stay where they are, as a GPU replays them, here one formula after the other."""

import dataclasses
import random

from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.graphs import DecodeSteps
from cabochon.generate.plain import PlainLoop
from cabochon.generate.sampling import SamplingParams
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import page_bytes, pages_for
from support import SMALL, small_model

CONFIG = dataclasses.replace(SMALL, head_dim=16, sliding_window=40, max_position=200)
STOP = frozenset({1})


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    draw, found = random.Random(3), []
    for i in range(count):
        prompt = [draw.randrange(2, CONFIG.vocab_size) for _ in range(draw.choice((1, 3, 40, 90)))]
        if found and i % 2:  # of which an earlier one may be a beginning
            prompt = draw.choice(found)[0][:70] + prompt[:20]
        sampled = SamplingParams(temperature=0.8, seed=i, max_new_tokens=30)
        found.append((prompt, draw.choice((SamplingParams(max_new_tokens=45), sampled))))
    return found


def alone(net: Gemma2, prompt: list[int], params: SamplingParams) -> list[int]:
    loop, tokens = PlainLoop(net, [prompt], [params], STOP), []
    while loop.live:
        tokens += [sampled.token for sampled in loop.step()]
    return tokens


def test_answers_are_those_of_the_plain_loop() -> None:
    """Of requests that come and go, wait for memory and share pages, in steps of up to 4 rows."""
    net, wanted = small_model(CONFIG, seed=5, size=0.15), requests(14)
    memory = 3 * pages_for(CONFIG, CONFIG.max_position) * page_bytes(CONFIG, net.cache_dtype)
    engine = Engine(net, STOP, EngineConfig(cache_bytes=memory, max_requests=4, chunk=70, busy_chunk=20))
    engine.decode = DecodeSteps(net, engine.pool)
    asked = [engine.submit(*one) for one in wanted]
    while not engine.idle:
        engine.step()
    for request, one in zip(asked, wanted, strict=True):
        assert request.generated == alone(net, *one)
    assert {2, 4} <= engine.decode.sizes
    engine.prefixes.clear()
    assert engine.pool.free == engine.pool.pages
