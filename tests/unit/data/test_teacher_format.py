"""What a stored teacher says comes back: ids exactly, probabilities within the error that is stated, in few bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import UsageError
from cabochon.data.teacher_format import (
    STEPS,
    ZERO,
    Said,
    decode,
    encode,
    fingerprint,
    high_bits,
    pack_ids,
    position_bytes,
    to_levels,
    unpack_ids,
)
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in

SMALLEST = np.exp(-(ZERO - 1) / STEPS)


@st.composite
def what_was_said(draw: st.DrawFn) -> tuple[Said, int]:
    """Any number of entries over any vocabulary, from a nearly certain teacher to one that knows nothing."""
    vocab = draw(st.one_of(st.integers(2, 300), st.integers(60_000, 70_000), st.integers(200_000, 300_000)))
    k, positions = draw(st.integers(1, min(70, vocab))), draw(st.integers(0, 9))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    sharp = draw(st.sampled_from([0.01, 0.3, 10.0]))
    shares = random.dirichlet(np.full(k + 1, sharp), positions)
    ids = np.stack([random.choice(vocab, k, replace=False) for _ in range(positions)] or [np.zeros(k, int)])[:positions]
    return Said(ids, shares[:, :k].astype(np.float32), shares[:, k].astype(np.float32)), vocab


@given(what_was_said())
def test_the_likeliest_come_back(case: tuple[Said, int]) -> None:
    said, vocab = case
    ids, probabilities, weights = decode(encode(said, vocab), "top-k", vocab)
    assert weights is None and ids.dtype == np.int32 and np.array_equal(ids, said.ids)
    # Half a step from rounding, and as much again from making the sum 1; what is below the smallest level is that.
    assert np.allclose(probabilities, said.probabilities, rtol=1.02 / STEPS, atol=2 * SMALLEST)
    rest = 1 - probabilities.sum(1, dtype=np.float64)
    assert np.allclose(rest, said.last, rtol=1.02 / STEPS, atol=1e-6)
    assert (probabilities.sum(1) <= 1 + 1e-6).all()


@given(what_was_said())
def test_a_sample_comes_back(case: tuple[Said, int]) -> None:
    said, vocab = case
    said = Said(said.ids, said.probabilities, said.probabilities.max(1) / 2 + np.float32(1e-6))
    ids, probabilities, weights = decode(encode(said, vocab), "sampled", vocab)
    assert np.array_equal(ids, said.ids) and weights is not None
    assert np.allclose(probabilities, said.probabilities, rtol=0.51 / STEPS, atol=2 * SMALLEST)
    wanted = np.maximum(said.probabilities, said.last[:, None]).astype(np.float64)
    wanted /= wanted.sum(1, keepdims=True)
    assert np.allclose(weights, wanted, rtol=1.02 / STEPS, atol=2 * SMALLEST)
    assert np.allclose(weights.sum(1), 1)


@given(st.integers(1, 2**24), st.integers(1, 20), st.integers(0, 5), st.integers(0, 10**6))
def test_ids_come_back_for_any_vocabulary(vocab: int, k: int, positions: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocab, (positions, k))
    ids.flat[:1] = vocab - 1
    low, high = pack_ids(ids, vocab)
    assert np.array_equal(unpack_ids(low, high, vocab), ids)
    assert low.nbytes + high.nbytes + 2 * (k + 1) * positions == positions * (position_bytes(k, vocab) - 12)


def test_a_token_with_64_entries_of_256000_takes_less_than_400_bytes() -> None:
    assert position_bytes(64, 256_000) == 286
    said = Said(np.zeros((7, 64), int), np.full((7, 64), 0.01, np.float32), np.full(7, 0.36, np.float32))
    assert sum(part.nbytes for part in encode(said, 256_000).values()) == 7 * (286 - 12)


def test_levels_end_at_both_sides() -> None:
    assert to_levels(np.array([1.0, 0.0, 1e-30, np.exp(-1 / STEPS)])).tolist() == [0, ZERO, ZERO - 1, 1]


def test_more_ids_than_24_bits_are_refused() -> None:
    assert [high_bits(size) for size in (65_536, 65_537, 262_145, 2**20 + 1)] == [0, 2, 4, 8]
    with pytest.raises(UsageError, match="cannot be stored"):
        high_bits(2**24 + 1)


def test_a_fingerprint_is_that_of_the_pieces() -> None:
    tokenizer, again = load_tokenizer(built_in()), load_tokenizer(built_in())
    assert fingerprint(tokenizer) == fingerprint(again)
    one, other = (again._backend.ids[piece] for piece in ("a", "b"))
    again._pieces[one], again._pieces[other] = again._pieces[other], again._pieces[one]
    again._bytes.clear()
    assert fingerprint(tokenizer) != fingerprint(again)
