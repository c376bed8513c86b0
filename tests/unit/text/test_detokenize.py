"""Streaming gives what decoding gives, cut before the first stop string, and holds nothing back without need."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cabochon.base.errors import UsageError
from cabochon.text.detokenize import StreamDecoder
from cabochon.text.tokenizer import Tokenizer

BYTES = range(123, 379)  # where the byte pieces of the golden tokenizers lie
PIECES = st.one_of(st.integers(0, 519), st.sampled_from(BYTES))
SMALL_TEXT = st.text("ab \u00e9", max_size=24)
STOPS = st.lists(st.text("ab \u00e9", min_size=1, max_size=4), max_size=4)


def stream(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[list[str], StreamDecoder]:
    decoder = StreamDecoder(tokenizer, stops)
    return [*(decoder.push(i) for i in ids), decoder.finish()], decoder


def cut(text: str, stops: list[str]) -> str:
    """The definition, spelled out: grow the text by one character until it ends with a stop string."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = {tokenizer.token_bytes(i): i for i in BYTES}
    return [ids[bytes([b])] for b in data]


def test_byte_pieces_are_where_we_think(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(i) for i in BYTES} == {bytes([b]) for b in range(256)}


@settings(deadline=None)
@given(ids=st.lists(PIECES, max_size=40))
def test_the_pieces_are_the_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, decoder = stream(tokenizer, ids, [])
    assert "".join(pieces) == decoder.text == tokenizer.decode(ids)
    assert not decoder.stopped


@settings(deadline=None)
@given(data=st.binary(max_size=24))
@example(b"\xe2\x82\xe2\x82\xac\xf0\x9f\x91")
@example(b"\xed\xa0\x80\xc0\x80\xf8")
def test_bytes_that_are_no_text(tokenizer: Tokenizer, data: bytes) -> None:
    ids = byte_ids(tokenizer, data)
    assert "".join(stream(tokenizer, ids, [])[0]) == data.decode("utf-8", errors="replace") == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_a_character_is_whole_and_comes_at_once(tokenizer: Tokenizer, text: str) -> None:
    decoder, data = StreamDecoder(tokenizer, []), text.encode()
    for count, token_id in enumerate(byte_ids(tokenizer, data), start=1):
        decoder.push(token_id)
        assert decoder.text == data[:count].decode("utf-8", errors="ignore")


@settings(deadline=None)
@given(ids=st.lists(PIECES, max_size=30), stops=st.lists(st.text(max_size=3, min_size=1), max_size=3))
def test_any_stop_strings(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    pieces, decoder = stream(tokenizer, ids, stops)
    text = tokenizer.decode(ids)
    assert "".join(pieces) == cut(text, stops)
    assert decoder.stopped == any(stop in text for stop in stops)


@settings(deadline=None)
@given(text=SMALL_TEXT, stops=STOPS, spelled=st.booleans())
@example("aab", ["aab", "ab"], True)
@example("abab a", ["aba ", "ba"], True)
@example("aaab", ["aab"], True)
@example("ab\u00e9", ["b\u00e9a", "ab\u00e9b"], True)
def test_overlapping_stop_strings(tokenizer: Tokenizer, text: str, stops: list[str], spelled: bool) -> None:
    ids = byte_ids(tokenizer, text.encode()) if spelled else tokenizer.encode(text)
    pieces, decoder = stream(tokenizer, ids, stops)
    assert "".join(pieces) == decoder.text == cut(text, stops)
    assert decoder.stopped == any(stop in text for stop in stops)


@settings(deadline=None)
@given(text=SMALL_TEXT, stops=STOPS)
def test_nothing_is_held_back_without_need(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    decoder, so_far = StreamDecoder(tokenizer, stops), ""
    for character in text:
        for token_id in byte_ids(tokenizer, character.encode()):
            decoder.push(token_id)
        so_far += character
        if decoder.stopped:
            break
        ends = (so_far[i:] for i in range(len(so_far) + 1))
        needed = next(end for end in ends if not end or any(stop.startswith(end) for stop in stops))
        assert decoder.text == so_far.removesuffix(needed)


def test_a_stop_string_within_one_piece(tokenizer: Tokenizer) -> None:
    house = tokenizer.encode("house", bos=False)
    assert len(house) == 1
    pieces, decoder = stream(tokenizer, [*house, *house], ["us"])
    assert pieces == ["ho", "", ""]
    assert decoder.stopped


def test_the_stop_string_that_is_complete_first_counts(tokenizer: Tokenizer) -> None:
    """Also when one piece completes several, so that it makes no difference how text falls into pieces."""
    house = tokenizer.encode("house", bos=False)
    for ids in (house, byte_ids(tokenizer, b"house")):
        assert "".join(stream(tokenizer, ids, ["hous", "u"])[0]) == "ho"
        assert "".join(stream(tokenizer, ids, ["us", "ous"])[0]) == "h"


def test_after_a_stop_nothing_comes(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer, ["b"])
    assert [decoder.push(i) for i in byte_ids(tokenizer, b"abc")] == ["a", "", ""]
    assert decoder.finish() == ""
    assert decoder.text == "a"


def test_a_beginning_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    pieces, decoder = stream(tokenizer, byte_ids(tokenizer, b"x\nUs"), ["\nUser:"])
    assert pieces == ["x", "", "", "", "\nUs"]
    assert not decoder.stopped


def test_control_pieces_are_silent(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, [2, 106, 107, 1], ["<eos>"])[0] == [""] * 5


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError):
        StreamDecoder(tokenizer, ["a", ""])
