"""Attention over pages, by the kernel and by torch, against attention over one piece; and the bookkeeping of pages."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.base.errors import CabochonError
from cabochon.model.attention import attention
from cabochon.model.kernels import attend as kernel
from cabochon.model.kernels.attend import attend_pages
from cabochon.model.kernels.native import library
from cabochon.model.paged import LET_GO, PAGE, PagedBatch, PagedSequence, PagePool, Segment, page_bytes, pages_for
from cabochon.model.visibility import Visibility
from support import SMALL

needs_kernels = pytest.mark.skipif(library() is None, reason="this processor or installation has no kernels")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@st.composite
def cases(draw: st.DrawFn) -> dict:
    kv_heads = draw(st.integers(1, 3))
    return {
        "lengths": draw(st.lists(st.integers(1, 3 * PAGE + 5), min_size=1, max_size=4)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 3)),
        "size": 16 * draw(st.sampled_from([1, 2, 3, 16, 17])),
        "window": draw(st.sampled_from([None, 1, 7, PAGE, 50])),
        "cap": draw(st.sampled_from([None, 50.0, 2.0])),
        "q_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "kv_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "spread": draw(st.sampled_from([0.05, 1.0, 30.0])),  # tiny scores need tanh's series, large ones its limit
        "seed": draw(st.integers(0, 999)),
    }


def paged_inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query at the end of each length; keys and values in pages scattered over the pool."""
    generator = torch.Generator().manual_seed(case["seed"])
    blocks = [-(-length // PAGE) for length in case["lengths"]]
    order = torch.randperm(sum(blocks) + 2, generator=generator)[: sum(blocks)].split(blocks)
    table = torch.full((len(blocks), max(blocks)), LET_GO, dtype=torch.int32)
    for row, pages in enumerate(order):
        table[row, : len(pages)] = pages.int()
    shape = (sum(blocks) + 2, case["kv_heads"], PAGE, case["size"])
    keys, values = (torch.randn(shape, generator=generator).to(case["kv_dtype"]) for _ in range(2))
    q = torch.randn(len(blocks), case["heads"], case["size"], generator=generator) * case["spread"]
    return q.to(case["q_dtype"]), keys, values, table


@needs_kernels
@settings(max_examples=120, deadline=None)
@given(cases())
@torch.inference_mode()
def test_the_kernel_equals_attention_over_one_piece(case: dict) -> None:
    q, keys, values, table = paged_inputs(case)
    positions = torch.tensor(case["lengths"]) - 1
    scale, options = case["size"] ** -0.5, {"window": case["window"], "softcap": case["cap"]}
    found = attend_pages(q, keys, values, table, torch.arange(len(q)), positions, scale=scale, **options)
    assert found is not None and found.dtype is q.dtype
    for i, length in enumerate(case["lengths"]):
        pages = table[i, : -(-length // PAGE)].long()
        k, v = (t[pages].transpose(0, 1).flatten(1, 2)[None, :, :length].float() for t in (keys, values))
        seen = Visibility(positions[i].view(1, 1), torch.arange(length)[None], case["window"])
        one = q[i, :, None].float()[None]
        expected = attention(one, k, v, seen, scale=scale, softcap=case["cap"], backend="plain")[0, :, 0]
        error = (found[i].float() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error < TOLERANCE[case["q_dtype"]] * max(1, case["spread"])
        one_row = (table[i : i + 1], torch.zeros(1, dtype=torch.long), positions[i : i + 1])
        alone = attend_pages(q[i : i + 1], keys, values, *one_row, scale=scale, **options)
        assert alone is not None and torch.equal(alone[0], found[i])  # the same bits in any company


CONFIG = dataclasses.replace(SMALL, head_dim=16, num_layers=4, sliding_window=40)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
@torch.inference_mode()
def test_steps_of_every_length_equal_attention_over_all(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences grow by steps of one, few and many tokens; every layer kind sees what it should."""
    if not kernel:
        monkeypatch.setattr("cabochon.model.kernels.native.library", lambda: None)
    pool = PagePool(CONFIG, 60, torch.float32)
    sequences = [PagedSequence(pool), PagedSequence(pool)]
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 200, 16, generator=draw) for heads in (4, 2, 2))
    steps = [(1, 70), (1, 1), (3, 5), (9, 40), (5, 5), (60, 2), (1, 33)]
    for counts in steps:
        order = sorted(range(2), key=lambda i: counts[i])
        segments = []
        for i in order:
            sequences[i].reserve(sequences[i].length + counts[i])
            segments.append(Segment(sequences[i], sequences[i].length, counts[i]))
        batch = PagedBatch(pool, segments)
        sights = batch.extend(batch.positions)
        for layer in range(CONFIG.num_layers):
            parts = [slice(s.start, s.start + s.count) for s in segments]
            new = [
                torch.cat([t[i, :, part] for i, part in zip(order, parts, strict=True)], dim=1)[None] for t in (q, k, v)
            ]
            mixed = batch.attend(layer, *new, sights[CONFIG.is_local(layer)], scale=0.3, softcap=5.0, backend=None)
            start = 0
            for i, segment in zip(order, segments, strict=True):
                end = segment.start + segment.count
                at = torch.arange(end)[None]
                seen = Visibility(at[:, segment.start :], at, CONFIG.window(layer))
                expected = attention(
                    q[i : i + 1, :, segment.start : end], k[i : i + 1, :, :end], v[i : i + 1, :, :end], seen,
                    scale=0.3, softcap=5.0, backend="plain",
                )  # fmt: skip
                assert torch.allclose(mixed[:, :, start : start + segment.count], expected, atol=2e-6)
                start += segment.count
        for segment in segments:
            segment.sequence.advance(segment.start + segment.count)
    for sequence in sequences:
        assert sum(page != LET_GO for page in sequence.blocks[True]) <= 40 // PAGE + 3
        sequence.close()
    assert pool.free == pool.pages and not pool.holders


def test_local_pages_are_let_go_and_global_ones_kept() -> None:
    pool = PagePool(CONFIG, 100, torch.float32)
    sequence = PagedSequence(pool)
    for length in range(10, 1000, 10):
        sequence.reserve(length)
        sequence.advance(length)
        held = pool.pages - pool.free
        assert held <= pages_for(CONFIG, length)
        first = max(0, length - CONFIG.sliding_window + 1) // PAGE
        assert LET_GO not in sequence.blocks[True][first:]  # what the next query sees is there
    assert len(sequence.blocks[False]) == -(-990 // PAGE)


def test_bytes_at_full_context_are_those_of_the_hybrid_cache() -> None:
    """A 9b sequence of 8192 tokens takes a quarter less than if all layers kept everything, but for three pages."""
    config = type(CONFIG).preset("9b")
    each = page_bytes(config, torch.bfloat16)
    taken = pages_for(config, 8192) * each
    everything = 2 * 8192 // PAGE * each
    assert everything == 42 * 8192 * 2 * 8 * 256 * 2
    assert 0.75 <= taken / everything < 0.757


def test_taking_back_guessed_tokens_frees_their_pages() -> None:
    pool = PagePool(CONFIG, 10, torch.float32)
    sequence = PagedSequence(pool)
    sequence.reserve(2 * PAGE + 1)
    assert pool.free == 4
    sequence.advance(PAGE)
    assert pool.free == 8


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", ["soft cap", "scale", "window edge"])
def test_a_kernel_that_drops_something_is_refused(
    feature: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel.attend_pages
    broken = {"soft cap": {"softcap": None}, "scale": {"scale": 0.25}, "window edge": {"window": 5}}[feature]

    def inert(*args: object, **options: object) -> object:
        return real(*args, **{k: broken.get(k, v) if v is not None else v for k, v in options.items()})

    kernel.prove(dtype)
    monkeypatch.setattr(kernel, "attend_pages", inert)
    with pytest.raises(CabochonError, match="refused") as caught:
        kernel.prove(dtype)
    assert feature in caught.value.cause
    monkeypatch.undo()
    kernel.prove(dtype)
