"""Likelihoods against transformers, sequence by sequence, on a model whose every example is of another length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cabochon
from cabochon.base.errors import BadInput
from cabochon.data.pack import Example
from cabochon.lm import LM
from cabochon.lm import likelihood as module
from cabochon.lm.likelihood import answer_example, likelihood, stretches
from support import SMALL, reference_model

OURS, THEIRS = reference_model(SMALL)


def made(lengths: list[int], seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, SMALL.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    return [Example(row, [False] + [bool(i % 3) or i == 1 for i in range(1, len(row))]) for row in ids]


@settings(max_examples=20, deadline=None)
@torch.inference_mode()
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=7), seed=st.integers(0, 99), room=st.integers(1, 60))
def test_batches_of_any_shape_give_what_transformers_gives_one_by_one(lengths: list[int], seed: int, room: int) -> None:
    examples = made(lengths, seed)
    nats, tokens, greedy = 0.0, 0, 0
    for example in examples:
        logits = THEIRS(torch.tensor([example.ids])).logits[0, :-1].double()
        kept = torch.tensor(example.learned[1:])
        targets = torch.tensor(example.ids[1:])
        nats -= float(logits.log_softmax(-1).gather(1, targets[:, None])[kept].sum())
        tokens += int(kept.sum())
        greedy += bool((logits.argmax(-1) == targets)[kept].all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRETCH", room)
        found = likelihood(LM(OURS), examples, 7)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.greedy, found.examples) == (tokens, greedy, len(examples))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 7, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_the_likeliest_tokens_are_the_models_own_answer() -> None:
    ids = [2, 5, 7]
    for _ in range(4):
        ids.append(int(THEIRS(torch.tensor([ids])).logits[0, -1].argmax()))
    learned = [False] * 3 + [True] * 4
    assert likelihood(LM(OURS), [Example(ids, learned)], 1).greedy == 1
    wrong = [*ids[:5], (ids[5] + 1) % SMALL.vocab_size, ids[6]]
    assert likelihood(LM(OURS), [Example(wrong, learned), Example(ids, learned)], 1).greedy == 1


def test_texts_and_answers_are_those_of_score() -> None:
    lm = cabochon.load()
    prompt, answer = "Two and two is", " four, and four"
    found = likelihood(lm, [answer_example(lm.text_tokenizer, prompt, answer)], len(answer))
    score = lm.score(prompt, answer)
    assert found.nats == pytest.approx(-score.logprob, rel=1e-4) and found.tokens == score.tokens
    assert bool(found.greedy) == score.is_greedy
    text = "A stretch of text that is longer than one stretch. " * 3
    parts = stretches(lm.text_tokenizer, text, 16)
    assert all(p.ids[0] == lm.text_tokenizer.bos_id and len(p.ids) <= 16 and not p.learned[0] for p in parts)
    assert [i for p in parts for i in p.ids[1:]] == lm.text_tokenizer.encode(text, bos=False)
    assert len(parts) > 2 and all(all(p.learned[1:]) for p in parts)


def test_what_cannot_be_measured_is_refused() -> None:
    lm = cabochon.load()
    with pytest.raises(BadInput, match="no answer"):
        answer_example(lm.text_tokenizer, "Question", "")
    with pytest.raises(BadInput, match="there is no text"):
        likelihood(lm, [], 0)
    too_long = Example([2] * (lm.context_length + 1), [True] * (lm.context_length + 1))
    with pytest.raises(BadInput, match="the context"):
        likelihood(lm, [too_long], 1)
