"""Lines and pieces of files: found once, read from anywhere, quoted with their place."""

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.data import records
from cabochon.data.records import BadRow, JsonLines, Record, TextFiles, open_content
from cabochon.data.streams import Looked, StandardInput

LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12), max_size=30)


class Memory:
    """Bytes that are in no file."""

    def __init__(self, content: bytes) -> None:
        self._content, self.size = content, len(content)

    def read(self, start: int, end: int) -> bytes:
        assert 0 <= start <= end <= self.size
        return self._content[start:end]


def lines(content: bytes) -> JsonLines:
    return JsonLines("f", Memory(content))


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines_are_where_they_are(texts: list[str], end: str, last: bool) -> None:
    content = end.join(texts) + (end if last and texts else "")
    rows = lines(content.encode())
    read = [rows.read(i) for i in range(len(rows.sizes))]
    wanted = [(f"f:{number}", line.encode()) for number, line in enumerate(content.split("\n"), start=1)]
    wanted = [(place, line.removesuffix(b"\r")) for place, line in wanted]
    assert [(r.place, r.content) for r in read] == [(place, line) for place, line in wanted if line]
    assert rows.sizes.tolist() == [len(line) for _, line in wanted if line]


def test_lines_are_found_across_the_blocks_that_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", 3)
    rows = lines(b"a\n\nbcd\r\nefgh\nij")
    assert [rows.read(i).content for i in range(len(rows.sizes))] == [b"a", b"bcd", b"efgh", b"ij"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON: Expecting"),
        (b"hello", "not JSON"),
        (b'{"a": "\xff"}', r"byte 8 \(0xff\) is not UTF-8"),
        ('{"a": "x"}'.encode("utf-16"), "not UTF-8"),
        (b"[1, 2]", "an object with keys, this is a list"),
        (b'"text"', "this is a string"),
        (b"null", "this is null"),
        (b"true", "this is true or false"),
        (b"12", "this is a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_a_line_that_is_no_row_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        Record("f:1", 0, line, "json").row()


def test_a_byte_order_mark_is_no_part_of_the_first_row() -> None:
    assert lines(b'\xef\xbb\xbf{"a": 1}\n').read(0).row() == {"a": 1}


@given(st.text(st.sampled_from("ab é\n漢 "), max_size=30_000), st.sampled_from([100, 5000]))
def test_pieces_of_a_text_are_the_text(text: str, size: int) -> None:
    content = text.encode()
    rows = TextFiles([("f", Memory(content))], size)
    pieces = [rows.read(i) for i in range(len(rows.sizes))]
    assert "".join(piece.row()["text"] for piece in pieces) == text  # so none is cut inside a character
    assert [p.begins for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(size <= n <= size + 4096 for n in rows.sizes[:-1])


def test_pieces_end_where_a_line_ends_if_one_is_near() -> None:
    content = b"a word\n" * 2000
    rows = TextFiles([("f", Memory(content))], 1000)
    assert all(rows.read(i).content.endswith(b"\n") for i in range(len(rows.sizes)))
    assert rows.read(1).place == f"f, byte {len(rows.read(0).content) + 1}"
    words = b"word " * 2000
    rows = TextFiles([("f", Memory(words))], 1000)
    assert all(rows.read(i).content.startswith(b" word") for i in range(1, len(rows.sizes)))


@given(st.lists(st.sampled_from(["word ", "é", "line\n", "\n\n"]), max_size=4000).map("".join))
def test_text_from_a_pipe_comes_in_pieces_too(text: str) -> None:
    read = list(StandardInput(io.BytesIO(text.encode()), 1000).rows(0))
    joined = "".join(record.row()["text"] for record in read)
    assert joined.strip() == text.strip() and joined in text
    assert [r.begins for r in read] == [i == 0 for i in range(len(read))]
    assert [r.ends for r in read] == [i == len(read) - 1 for i in range(len(read))]


@given(LINES.map(lambda texts: [json.dumps({"text": t}) for t in texts]), st.integers(0, 5))
def test_json_lines_from_a_pipe_are_those_of_a_file(rows: list[str], skip: int) -> None:
    content = ("\n\n" + "".join(f"{row}\n\n" for row in rows)).encode()
    file = lines(content)
    wanted = [(file.read(i).number, file.read(i).content) for i in range(len(file.sizes))]
    read = list(StandardInput(io.BytesIO(content), 10).rows(skip))
    assert [(r.number, r.content) for r in read] == wanted[skip:]
    assert [r.place for r in read] == [f"standard input:{3 + 2 * i}" for i in range(skip, len(rows))]


def test_a_pipe_is_looked_at_without_losing_a_row() -> None:
    looked = Looked(StandardInput(io.BytesIO(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'), 100))
    assert [r.row()["a"] for r, _ in zip(looked.first(), range(2), strict=False)] == [1, 2]
    assert [r.row()["a"] for r in looked.first()] == [1, 2, 3]
    assert [r.row()["a"] for r in looked.rows(1)] == [2, 3]
    with pytest.raises(UsageError, match="comes only once"):
        looked.rows(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_packed_file_is_what_was_packed(folder: Path) -> None:
    path = folder / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "one"}\n' * 1000)
    rows = JsonLines("f", open_content(path))
    assert len(rows.sizes) == 1000 and rows.read(999).row() == {"text": "one"}
    packed = path.read_bytes()
    for damaged in (packed[:-9], packed[:20], b"no gzip", packed[:12] + b"\0\0\0\0" + packed[16:]):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="cannot be unpacked"):
            open_content(path)


def test_a_file_that_changes_while_it_is_read_is_noticed(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    content = open_content(path)
    path.write_text('{"text": "another one"}\n')
    with pytest.raises(BadInput, match="changed while it was in use"):
        content.read(0, 5)
    path.unlink()
    with pytest.raises(MissingResource, match="cannot be read"):
        content.read(0, 5)
