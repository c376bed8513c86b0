"""Scores over the tree of all texts against the model on each text alone."""

import dataclasses
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.base.errors import MissingResource
from cabochon.evaluate import scores
from cabochon.evaluate.scores import score
from cabochon.evaluate.tree import Scored
from cabochon.generate.engine import EngineConfig
from cabochon.lm import LM
from cabochon.model import head
from cabochon.model.paged import page_bytes
from support import SMALL, configs, small_model


def lm_with(pages=None, config=SMALL, **changes):
    model = small_model(dataclasses.replace(config, **changes))
    memory = None if pages is None else pages * page_bytes(model.config, torch.float32)
    return LM(model, None, EngineConfig(cache_bytes=memory, max_requests=4))


@torch.inference_mode()
def alone(lm, text):
    """(log-probability, greedy) by the plainest way."""
    ids = torch.tensor(text.ids.tolist())
    logits = lm.model(ids[None, :-1])[0, text.start - 1 :] if len(ids) > 1 else torch.zeros(0, SMALL.vocab_size)
    targets = ids[text.start :]
    logprobs = logits.double().log_softmax(-1).gather(1, targets[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


def questions(seed, groups, choices=4, shared=40, own=9, tail=5):
    """Texts in groups with a common beginning, as the choices of questions behind the same examples are."""
    draw = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(3, SMALL.vocab_size, (count,), generator=draw).tolist()

    texts, examples = [], [2, *some(shared)]
    for group in range(groups):
        question = [*examples, *some(own + group)]
        for choice in range(choices):
            ids = array("i", [*question, *some(1 + (group + choice) % tail)])
            texts.append(Scored(ids, len(question)))
    return texts


def check(lm, texts):
    found = {one.number: one for one in score(lm, texts)}
    assert sorted(found) == list(range(len(texts)))
    for number, text in enumerate(texts):
        logprob, greedy = alone(lm, text)
        assert found[number].logprob == pytest.approx(logprob, abs=1e-4)
        assert found[number].is_greedy == greedy
    assert lm.engine.pool.free == lm.engine.pool.pages  # nothing is held on to


@pytest.mark.parametrize("window", [3, 40, 400])
def test_scores_are_those_of_each_text_alone(window):
    check(lm_with(sliding_window=window), questions(0, groups=7))


def test_greedy_continuations_are_known():
    lm = lm_with()
    text = [2, 5, 9]
    for _ in range(6):
        text.append(int(lm.model(torch.tensor([text]))[0, -1].argmax()))
    greedy, other = array("i", text), array("i", [*text[:-1], (text[-1] + 1) % SMALL.vocab_size])
    assert [
        one.is_greedy for one in sorted(score(lm, [Scored(greedy, 3), Scored(other, 3)]), key=lambda f: f.number)
    ] == [
        True,
        False,
    ]


def test_equal_texts_and_texts_within_texts():
    whole = questions(1, groups=1, choices=1, tail=9)[0]
    parts = [Scored(whole.ids[:end], start) for end in (5, 33, 34, len(whole.ids)) for start in (1, end - 1, end)]
    check(lm_with(), [whole, whole, *parts])


def test_long_texts_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(scores, "CHUNKS", {"cpu": 7})
    check(lm_with(sliding_window=20), questions(2, groups=3, shared=90))


def test_logits_are_made_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * SMALL.vocab_size * 3)
    check(lm_with(), questions(2, groups=5))


@pytest.mark.parametrize("pages", [10, 12, 20])
def test_little_memory_costs_time_and_nothing_else(pages):
    check(lm_with(pages, sliding_window=200), questions(3, groups=12, choices=3, shared=100, own=30))


def test_a_text_that_no_cache_holds_is_refused_and_the_others_can_go_on():
    lm = lm_with(4)
    with pytest.raises(MissingResource, match="too small"):
        list(score(lm, questions(4, groups=2, shared=200)))
    check(lm, questions(4, groups=2, shared=20, own=3))


def test_stopping_early_gives_the_memory_back():
    lm = lm_with()
    found = score(lm, questions(5, groups=9))
    next(found)
    found.close()
    assert lm.engine.pool.free == lm.engine.pool.pages


@settings(max_examples=15)
@given(configs(), st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=70), min_size=1, max_size=6), st.data())
def test_any_texts_in_any_model(config, lists, data):
    texts = [Scored(array("i", [2, *ids]), data.draw(st.integers(1, 1 + len(ids)))) for ids in lists]
    check(lm_with(config=config), texts)


def test_prompts_that_the_engine_remembers_do_not_matter():
    lm, texts = lm_with(), questions(6, groups=2)
    lm.generate(texts[0].ids.tolist(), max_new_tokens=4)
    check(lm, texts)
