"""The engine answers every request as the plain loop answers it alone, whatever else goes on, and leaves no memory."""

import dataclasses
import random

import pytest
import torch

from cabochon.base.errors import MissingResource, UsageError
from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.plain import PlainLoop
from cabochon.generate.sampling import SamplingParams
from cabochon.generate.speculate import DraftModel, PromptLookup
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import page_bytes, pages_for
from support import SMALL, small_model

# The head size is one that the kernel takes; the window is shorter than the prompts and no multiple of a page.
CONFIG = dataclasses.replace(SMALL, head_dim=32, sliding_window=41, max_position=512)
STOP = frozenset({1, 7})


@pytest.fixture(scope="module")
def model() -> Gemma2:
    return small_model(CONFIG, seed=3, size=0.15)


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(8, CONFIG.vocab_size) for _ in range(length)]


def alone(model: Gemma2, prompt: list[int], params: SamplingParams) -> list[int]:
    loop, tokens = PlainLoop(model, [prompt], [params], STOP), []
    while loop.live:
        tokens += [sampled.token for sampled in loop.step()]
    return tokens


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def left_over(engine: Engine) -> int:
    engine.prefixes.clear()
    return engine.pool.pages - engine.pool.free


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_answers_are_those_of_the_plain_loop(model: Gemma2, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr("cabochon.model.kernels.native.library", lambda: None)
    engine = Engine(model, STOP, EngineConfig(chunk=40, busy_chunk=13, max_requests=5))
    wanted = [
        (prompt_of(length, length), SamplingParams(max_new_tokens=new, temperature=heat, seed=length, top_k=20))
        for length, new, heat in [
            (1, 30, 0),
            (5, 60, 0.8),
            (90, 40, 0),
            (130, 20, 1.0),
            (33, 50, 0),
            (64, 3, 0),
            (200, 9, 0),
        ]
    ]
    requests = [engine.submit(prompt, params) for prompt, params in wanted]
    run(engine)
    for request, (prompt, params) in zip(requests, wanted, strict=True):
        assert request.generated == alone(model, prompt, params)
        assert [event.token for event in request.events] == request.generated
        assert [event.last for event in request.events][-1] in ("stop", "length")
    assert left_over(engine) == 0


def test_a_known_beginning_is_not_computed_again(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig())
    prompt, params = prompt_of(100, 1), SamplingParams(max_new_tokens=20)
    first = engine.submit(prompt, params)
    run(engine)
    more = [*first.tokens[:-1], *prompt_of(10, 2)]
    second = engine.submit(more, params)
    branch = engine.submit([*prompt[:70], *prompt_of(30, 3)], params)
    run(engine)
    # The last token of an answer was never fed; all before it are known, to the token, not only to the page.
    assert first.reused == 0
    assert second.reused == len(first.tokens) - 1
    assert branch.reused == 70
    assert second.generated == alone(model, more, params)
    assert branch.generated == alone(model, branch.prompt, params)
    assert left_over(engine) == 0


def test_a_beginning_whose_window_is_gone_is_computed_again(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig())
    params = SamplingParams(max_new_tokens=4)
    prompt = prompt_of(300, 4)
    engine.submit(prompt, params)
    run(engine)
    for node in engine.prefixes._order.values():  # as if only what long sequences keep were left
        if node.pages[True] >= 0:
            engine.pool.give(node.pages[True])
            node.pages[True] = -1
    again = engine.submit(prompt, params)
    run(engine)
    assert again.reused == 0
    assert again.generated == alone(model, prompt, params)


def test_when_memory_is_short_requests_wait_and_all_are_answered(model: Gemma2) -> None:
    pages = pages_for(CONFIG, 160)  # one long request, or a few short ones
    engine = Engine(model, STOP, EngineConfig(cache_bytes=pages * page_bytes(CONFIG, torch.float32), chunk=32))
    wanted = [
        (prompt_of(20 + 13 * i, i), SamplingParams(max_new_tokens=40 + i, logit_bias={1: -99, 7: -99}))
        for i in range(7)
    ]
    requests = [engine.submit(*request) for request in wanted]
    postponed = 0
    while not engine.idle:
        engine.step()
        postponed += sum(bool(request.generated) for request in engine.waiting)
    assert postponed  # somebody had to give way in the middle of an answer
    for request, (prompt, params) in zip(requests, wanted, strict=True):
        assert request.generated == alone(model, prompt, params)
    assert left_over(engine) == 0


def test_a_request_that_can_never_fit_is_refused_and_the_others_go_on(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig(cache_bytes=6 * page_bytes(CONFIG, torch.float32)))
    fine = engine.submit(prompt_of(20, 1), SamplingParams(max_new_tokens=8))
    with pytest.raises(MissingResource, match="cache is too small"):
        engine.submit(prompt_of(400, 1), SamplingParams(max_new_tokens=8))
    run(engine)
    assert fine.done and fine.generated
    with pytest.raises(UsageError, match="too small"):
        Engine(model, STOP, EngineConfig(cache_bytes=0))


def test_cancelling_frees_memory_at_once(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig(chunk=16))
    running, reading, waiting = (engine.submit(prompt_of(60, i), SamplingParams(max_new_tokens=50)) for i in range(3))
    while not running.generated:
        engine.step()
    for request in (reading, waiting, running):
        engine.cancel(request)
        engine.cancel(request)
    assert engine.idle and running.done
    assert engine.pool.pages - engine.pool.free == sum(len(n.pages) for n in engine.prefixes._order.values())
    again = engine.submit(running.tokens, SamplingParams(max_new_tokens=1))
    run(engine)
    assert again.reused == len(running.tokens) - 1  # what was cut short is not computed again either
    assert left_over(engine) == 0


def test_a_long_prompt_does_not_hold_up_running_answers(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig(busy_chunk=8))
    quick = engine.submit(prompt_of(3, 2), SamplingParams(max_new_tokens=60, logit_bias={1: -100, 7: -100}))
    engine.step()
    engine.submit(prompt_of(300, 1), SamplingParams(max_new_tokens=1))
    for _ in range(20):
        before = len(quick.generated)
        engine.step()
        assert len(quick.generated) == before + 1


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_changed_weights_are_used_at_once(model: Gemma2, temperature: float) -> None:
    changed = small_model(CONFIG, seed=4, size=0.15)
    mine = small_model(CONFIG, seed=3, size=0.15)
    engine = Engine(mine, STOP, EngineConfig())
    prompt, params = prompt_of(50, 5), SamplingParams(max_new_tokens=12, temperature=temperature, seed=1)
    engine.submit(prompt, params)
    run(engine)
    mine.load_state_dict(changed.state_dict())
    engine.weights_changed()
    request = engine.submit(prompt, params)
    run(engine)
    assert request.reused == 0
    assert request.generated == alone(changed, prompt, params)


def speculators(model: Gemma2) -> list[object]:
    other = small_model(dataclasses.replace(CONFIG, num_layers=1), seed=3, size=0.15)
    return [PromptLookup(), DraftModel(other, model), DraftModel(model, model, ahead=3)]


@pytest.mark.parametrize("which", range(3), ids=["lookup", "draft", "itself"])
def test_greedy_answers_are_the_same_with_speculation(model: Gemma2, which: int) -> None:
    speculator = speculators(model)[which]
    engine = Engine(model, STOP, EngineConfig(chunk=50), speculator)
    pattern = prompt_of(9, 9) * 12  # repeats itself, so that looking up finds something
    wanted = [(pattern, SamplingParams(max_new_tokens=60)), (prompt_of(70, 1), SamplingParams(max_new_tokens=45)),
              (prompt_of(2, 1), SamplingParams(max_new_tokens=90, repetition_penalty=1.3))]  # fmt: skip
    requests = [engine.submit(*request) for request in wanted]
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    for request, (prompt, params) in zip(requests, wanted, strict=True):
        assert request.generated == alone(model, prompt, params)
    assert left_over(engine) == 0
    if which == 2:  # a draft that always guesses right: four tokens a step
        assert steps < 45
        assert speculator.pool.free == speculator.pool.pages


def test_a_draft_with_another_vocabulary_is_refused(model: Gemma2) -> None:
    other = small_model(dataclasses.replace(CONFIG, vocab_size=300))
    with pytest.raises(UsageError, match="cannot guess"):
        DraftModel(other, model)


def test_a_beginning_that_is_being_read_is_waited_for(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig(chunk=16))
    prompt, params = prompt_of(96, 6), SamplingParams(max_new_tokens=5)
    requests = [engine.submit([*prompt, 10 + i], params) for i in range(5)]
    run(engine)
    assert [r.reused for r in requests] == [0, 96, 96, 96, 96]
    for request in requests:
        assert request.generated == alone(model, request.prompt, params)


class _DeadEnd:
    """A grammar that allows two tokens and then leads nowhere."""

    def __init__(self) -> None:
        self.left = 2

    def mask(self) -> torch.Tensor:
        if not self.left:
            raise UsageError("the grammar leads nowhere", "no token may follow", "change it")
        return torch.arange(CONFIG.vocab_size) == 50 + self.left

    def accept(self, token: int) -> None:
        self.left -= 1


def test_a_grammar_that_leads_nowhere_ends_its_own_request_alone(model: Gemma2) -> None:
    engine = Engine(model, STOP, EngineConfig())
    params = SamplingParams(max_new_tokens=9)
    bad = engine.submit(prompt_of(5, 1), params, matcher=_DeadEnd())
    good = engine.submit(prompt_of(6, 2), params)
    run(engine)
    assert bad.done and isinstance(bad.failure, UsageError) and bad.generated == [52, 51]
    assert good.generated == alone(model, good.prompt, params) and good.failure is None
    assert left_over(engine) == 0
