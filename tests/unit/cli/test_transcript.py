"""Saved conversations: what is written is read back, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, MissingResource
from cabochon.cli.transcript import FORMAT, MAX_BYTES, Transcript, read_transcript, write_transcript

text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(system=st.none() | text, turns=st.lists(st.tuples(text, text), max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, system: str | None, turns: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("chat") / "a.json"
    write_transcript(path, Transcript(system, turns))
    assert read_transcript(path) == Transcript(system, turns)


def document(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]
    return {"format": FORMAT, "system": None, "messages": messages, **changes}


def pair(second: Any) -> list[Any]:
    return [{"role": "user", "content": "a"}, second]


@pytest.mark.parametrize(
    "bad",
    [
        [],
        "text",
        document(format="other"),
        document(extra=1),
        {"format": FORMAT, "messages": []},
        document(system=3),
        document(messages={}),
        document(messages=pair({"role": "model", "content": "b"})[:1]),
        document(messages=pair({"role": "user", "content": "b"})),
        document(messages=pair({"role": "system", "content": "b"})),
        document(messages=pair({"role": "model", "content": 3})),
        document(messages=pair({"role": "model", "content": " "})),
        document(messages=pair({"role": "model", "content": "\ud800"})),
        document(messages=pair({"role": "model", "content": "b", "extra": 1})),
        document(messages=pair(["model", "b"])),
    ],
    ids=repr,
)
def test_anything_else_is_refused(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(BadInput, match="is not a saved conversation"):
        read_transcript(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="not JSON"):
        read_transcript(path)


def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(BadInput, match="larger than"):
        read_transcript(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingResource):
        read_transcript(tmp_path / "none.json")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingResource):
        read_transcript(tmp_path)


def test_only_a_saved_conversation_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_transcript(path, Transcript(None, []))
    write_transcript(path, Transcript("new", []))
    assert read_transcript(path).system == "new"
    path.write_text("precious")
    with pytest.raises(BadInput, match="choose another name"):
        write_transcript(path, Transcript(None, []))
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingResource, match="was not written"):
        write_transcript(tmp_path / "none" / "a.json", Transcript(None, []))
