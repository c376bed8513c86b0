"""Calls read out of text as it comes, wherever it is cut."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.serve.tools import CallReader

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=4), values, max_size=4)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def read(parts: list[str], whole: bool = True) -> tuple[CallReader, list[dict[str, Any]]]:
    reader = CallReader()
    deltas = [delta for part in parts for delta in reader.push(part)]
    return reader, deltas + reader.finish(whole)


@given(arguments, st.lists(st.integers(0, 500), max_size=12), st.sampled_from([None, 1, 4]), st.booleans())
def test_a_call_comes_out_whole(given: dict[str, Any], cuts: list[int], indent: int | None, ascii: bool) -> None:
    text = json.dumps({"name": "f-1", "arguments": given}, indent=indent, ensure_ascii=ascii)
    reader, deltas = read(pieces(f" \n{text}\n", cuts))
    assert reader.called and "content" not in {key for delta in deltas for key in delta}
    first, *more = [delta["tool_calls"][0] for delta in deltas]
    assert first["function"] == {"name": "f-1", "arguments": ""}
    assert json.loads("".join(m["function"]["arguments"] for m in more)) == given


@given(st.text(max_size=40), st.lists(st.integers(0, 50), max_size=6))
def test_other_text_comes_out_as_it_is(text: str, cuts: list[int]) -> None:
    reader, deltas = read(pieces(text, cuts))
    assert not reader.called and "".join(delta["content"] for delta in deltas) == text


@pytest.mark.parametrize("cut", range(40, 60))
def test_a_call_that_was_cut_off(cut: int) -> None:
    text = '{"name": "f", "arguments": {"a": {"b": "}}"}, "c": 1}}'[:cut]
    _, deltas = read([text], whole=False)
    said = "".join(d["tool_calls"][0]["function"]["arguments"] for d in deltas)
    assert text.removeprefix('{"name": "f", "arguments": ') == said
