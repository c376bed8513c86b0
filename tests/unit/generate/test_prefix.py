"""The memory of prompts: finds exactly the longest known beginning, and never loses or frees a page twice."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.generate.prefix import PrefixMemory
from cabochon.model.paged import PAGE, OutOfPages, PagedSequence, PagePool
from support import SMALL

CONFIG = dataclasses.replace(SMALL, num_layers=2, sliding_window=10 * PAGE)
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=5 * PAGE)


def pool(pages: int = 400) -> PagePool:
    return PagePool(CONFIG, pages, torch.float32)


def process(memory: PrefixMemory, tokens: list[int]) -> PagedSequence:
    """Recall what is known of a text and "compute" the rest: each position's key says which text it belongs to."""
    sequence = memory.recall(tokens)
    start = sequence.length
    sequence.reserve(len(tokens))
    for position in range(start, len(tokens)):
        for pages in sequence.blocks.values():
            memory.pool.keys[0][pages[position // PAGE], :, position % PAGE] = fingerprint(tokens, position)
    sequence.advance(len(tokens))
    return sequence


def fingerprint(tokens: list[int], position: int) -> float:
    return float(hash(tuple(tokens[: position + 1])) % 100_003)


def keys(sequence: PagedSequence, *, local: bool = False) -> list[float]:
    blocks = sequence.blocks[local]
    return [float(sequence.pool.keys[0][blocks[p // PAGE], 0, p % PAGE, 0]) for p in range(sequence.length)]


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_recalled_keys_belong_to_the_very_text(texts: list[list[int]]) -> None:
    memory = PrefixMemory(pool())
    seen: list[list[int]] = []
    for text in texts:
        found = memory.recall(text)
        common = max((agreement(text[:-1], old) for old in seen), default=0)
        assert found.length == common  # to the token, not only to the page
        found.close()
        sequence = process(memory, text)
        assert keys(sequence) == [fingerprint(text, p) for p in range(len(text))]
        memory.remember(text, sequence, whole=True)
        sequence.close()
        seen.append(text)
    memory.clear()
    assert memory.pool.free == memory.pool.pages
    assert not memory.pool.holders


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=4, max_size=14))
def test_in_a_small_pool_old_texts_are_forgotten_and_nothing_is_lost(texts: list[list[int]]) -> None:
    memory = PrefixMemory(pool(12))
    for text in texts:
        sequence = memory.recall(text)
        memory.forget(2 * (len(text) // PAGE + 1))
        sequence.reserve(len(text))
        sequence.advance(len(text))
        memory.remember(text, sequence, whole=True)
        sequence.close()
        assert memory.pool.free + len(memory.pool.holders) == memory.pool.pages
    memory.clear()
    assert memory.pool.free == memory.pool.pages and len(memory) == 0


def test_what_is_in_use_survives_forgetting() -> None:
    memory = PrefixMemory(pool(20))
    text = list(range(3 * PAGE))
    sequence = process(memory, text)
    memory.remember(text, sequence, whole=True)
    memory.forget(20)
    assert len(memory) == 0
    assert keys(sequence) == [fingerprint(text, p) for p in range(len(text))]
    sequence.close()
    assert memory.pool.free == 20


@pytest.mark.parametrize(("pages", "known"), [(4, PAGE), (5, PAGE), (6, PAGE + 8)])
def test_a_copy_does_not_push_out_what_it_is_made_with(pages: int, known: int) -> None:
    """Two full pages and the two that follow are known; no page, one, or both that the copies need are free."""
    memory = PrefixMemory(pool(pages))
    text = list(range(PAGE + 8))
    sequence = process(memory, text)
    memory.remember(text, sequence, whole=True)
    sequence.close()
    found = memory.recall([*text, 1])
    assert found.length == known
    for local in (False, True):
        assert keys(found, local=local) == [fingerprint(text, p) for p in range(known)]
    found.close()
    memory.clear()
    assert memory.pool.free == pages and not memory.pool.holders


def test_the_oldest_is_forgotten_first() -> None:
    memory = PrefixMemory(pool(8))
    old, new = [1] * PAGE, [2] * PAGE
    for text in (old, new, old):  # the old one was used last
        sequence = process(memory, text)
        memory.remember(text, sequence, whole=True)
        sequence.close()
    memory.forget(memory.pool.free + 1)
    found = memory.recall([*old, 0])
    assert found.length == PAGE
    assert memory.recall([*new, 0]).length == 0


def test_a_full_pool_refuses_and_keeps_count() -> None:
    small = pool(3)
    sequence = PagedSequence(small)
    with pytest.raises(OutOfPages):
        sequence.reserve(2 * PAGE)
    sequence.close()
    assert small.free == 3


def agreement(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
