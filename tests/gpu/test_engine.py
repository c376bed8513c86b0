"""Answers on a GPU: those of the plain loop, also where steps are replayed as graphs; and what is left behind."""

import dataclasses
import gc
import random
from typing import Any

import pytest
import torch

from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.plain import PlainLoop
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.generate.speculate import PromptLookup
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import page_bytes, pages_for
from cabochon.weights.quantize import quantize_layers
from support import SMALL, small_model

pytestmark = pytest.mark.gpu
CONFIG = dataclasses.replace(SMALL, hidden_size=48, head_dim=32, sliding_window=50, max_position=256)
STOP = frozenset({1})


def model(device: str) -> Gemma2:
    return small_model(CONFIG, seed=5, size=0.15).to(device)


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of any length, half of them continuations of earlier ones; greedy, sampled and penalised."""
    draw, found = random.Random(7), []
    for i in range(count):
        prompt = [draw.randrange(2, CONFIG.vocab_size) for _ in range(draw.choice((1, 3, 20, 60, 110)))]
        if found and i % 2:
            prompt = draw.choice(found)[0][:90] + prompt[:30]
        params = SamplingParams(
            max_new_tokens=draw.choice((1, 5, 20, 40)),
            temperature=draw.choice((0, 0, 0.8)),
            top_k=draw.choice((0, 10)),
            top_p=draw.choice((1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.2)),
            seed=draw.randrange(1000),
        )
        found.append((prompt, params))
    return found


def alone(net: Gemma2, prompt: list[int], params: SamplingParams) -> list[int]:
    loop, tokens = PlainLoop(net, [prompt], [params], STOP), []
    while loop.live:
        tokens += [sampled.token for sampled in loop.step()]
    return tokens


def run(engine: Engine, wanted: list[tuple[list[int], SamplingParams]]) -> list[Request]:
    asked = [engine.submit(*one) for one in wanted]
    while not engine.idle:
        engine.step()
    return asked


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculating"])
def test_answers_are_those_of_the_plain_loop(gpu: str, speculate: bool) -> None:
    net, wanted = model(gpu), requests(24)
    memory = 5 * pages_for(CONFIG, CONFIG.max_position) * page_bytes(CONFIG, net.cache_dtype)
    config = EngineConfig(cache_bytes=memory, max_requests=9, chunk=70, busy_chunk=20)
    engine = Engine(net, STOP, config, PromptLookup() if speculate else None)
    for request, one in zip(run(engine, wanted), wanted, strict=True):
        if not speculate or one[1].temperature == 0:
            assert request.generated == alone(net, *one)
    assert engine.decode is not None and engine.decode.graphs == len(engine.decode.sizes) > 0
    engine.prefixes.clear()
    assert engine.pool.free == engine.pool.pages


def test_a_seed_gives_the_same_answer_on_any_device(gpu: str) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=3)
    answers = [run(Engine(model(d), STOP, EngineConfig(max_requests=2)), [([5, 6, 7], params)]) for d in ("cpu", gpu)]
    assert answers[0][0].generated == answers[1][0].generated


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_answers(gpu: str, bits: int) -> None:
    """One token after the other gives the logits of the whole text at once, up to the rounding of activations."""
    net = model(gpu)
    quantize_layers(net, bits, 32, embedding=True)
    engine = Engine(net, STOP, EngineConfig(max_requests=1, chunk=16))
    prompt = [5, 9, 14, 3] * 10
    request = run(engine, [(prompt, SamplingParams(max_new_tokens=20, logprobs=0))])[0]
    with torch.inference_mode():
        logits = net(torch.tensor([prompt + request.generated], device=gpu))[0, len(prompt) - 1 : -1].log_softmax(-1)
    told = [event.logprob.logprob for event in request.events if event.logprob]
    whole = [float(row[token]) for row, token in zip(logits, request.generated, strict=True)]
    assert max(abs(a - b) for a, b in zip(told, whole, strict=True)) < 0.1


def test_changed_weights_are_seen(gpu: str) -> None:
    net, params = model(gpu), SamplingParams(max_new_tokens=20)
    engine = Engine(net, STOP, EngineConfig(max_requests=2))
    run(engine, [([5, 6, 7], params)])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    engine.weights_changed()
    assert run(engine, [([5, 6, 7], params)])[0].generated == alone(net, [5, 6, 7], params)


class Peeking(torch.nn.Module):
    """A layer that looks at its values, which no graph can."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.abs().sum()) >= 0 else x


def test_what_cannot_be_captured_runs_without_a_graph(gpu: str) -> None:
    net, params = model(gpu), SamplingParams(max_new_tokens=10)
    expected = alone(net, [5, 6, 7], params)
    net.layers[0].attention.o = Peeking(net.layers[0].attention.o)  # type: ignore[union-attr]
    engine = Engine(net, STOP, EngineConfig(max_requests=2))
    assert run(engine, [([5, 6, 7], params)])[0].generated == expected
    assert engine.decode is not None and engine.decode.graphs == 0


def test_memory_is_given_back(gpu: str) -> None:
    net = model(gpu)

    def used() -> int:
        engine = Engine(net, STOP, EngineConfig(cache_bytes=2**22, max_requests=3))
        run(engine, requests(6))
        del engine
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = used()  # kernels, workspaces of products
    assert used() <= first
