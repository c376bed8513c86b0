"""A name to rows: files of every kind, folders, Parquet, and what the datasets library streams."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from stream_checks import Ranks, Writer, documents, expected

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.data import order, parquet
from cabochon.data.config import DataConfig
from cabochon.data.records import Joined, Record
from cabochon.data.sources import open_source
from cabochon.data.stream import open_stream
from cabochon.data.streams import HubDataset
from cabochon.data.supply import Passing
from cabochon.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "golden" / "text"


def rows_of(source: Path | str) -> list[tuple[str, Any]]:
    found = open_source(str(source), 16)
    assert isinstance(found, list)
    joined = Joined(found)
    read = [joined.read(i) for i in range(len(joined.sizes))]
    assert [record.number for record in read] == list(range(len(read)))
    return [(record.place, record.row()) for record in read]


def write_table(path: Path, rows: list[Any], group: int = 100) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_a_folder_is_all_its_files_by_name(tmp_path: Path, jsonl: Writer) -> None:
    jsonl("set/b.jsonl", [{"text": "b"}])
    jsonl("set/a/z.json", [{"text": "z"}])
    jsonl("set/a/notes.md", ["# Notes"])
    jsonl("set/a/readme.rst", ["left aside"])
    jsonl("set/.cache/x.jsonl", [{"text": "hidden"}])
    jsonl("set/empty.jsonl", [])
    write_table(tmp_path / "set" / "c.parquet", [{"text": "c"}])
    folder = tmp_path / "set"
    assert rows_of(folder) == [
        (f"{folder}/a/notes.md", {"text": "# Notes\n"}),
        (f"{folder}/a/z.json:1", {"text": "z"}),
        (f"{folder}/b.jsonl:1", {"text": "b"}),
        (f"{folder}/c.parquet row 1", {"text": "c"}),
    ]


def test_rows_of_tables_keep_their_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = [{"text": f"row {i}", "other": i} for i in range(25)]
    first = write_table(tmp_path / "set" / "0.parquet", rows[:15], group=4)
    second = write_table(tmp_path / "set" / "1.parquet", rows[15:], group=100)
    wanted = [(f"{first} row {i + 1}", {"text": f"row {i}"}) for i in range(15)]
    wanted += [(f"{second} row {i - 14}", {"text": f"row {i}"}) for i in range(15, 25)]
    assert rows_of(tmp_path / "set") == wanted


def test_messages_in_tables(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "the tree"}, {"role": "assistant", "content": "sings"}]
    write_table(tmp_path / "chat.parquet", [{"messages": chat, "id": 1}])
    config = DataConfig(sources=(str(tmp_path / "chat.parquet"),), epochs=1)
    with open_stream(config, tokenizer, rows=1, length=32) as stream:
        assert next(stream).num_targets == len(tokenizer.encode("sings", bos=False)) + 1


def test_shuffling_a_large_table_unpacks_each_row_group_about_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (order, parquet):
        monkeypatch.setattr(module, "WINDOW", 100)
    path = write_table(tmp_path / "rows.parquet", [{"text": f"the tree {i}"} for i in range(2000)], group=20)
    unpacked: list[int] = []
    read = parquet.Parquet._read_group

    def counting(self: parquet.Parquet, group: int) -> Any:
        unpacked.append(group)
        return read(self, group)

    monkeypatch.setattr(parquet.Parquet, "_read_group", counting)
    with Ranks(DataConfig(sources=(str(path),), epochs=1), tokenizer, rows=4, length=64) as ranks:
        found = documents(ranks.batches(), tokenizer.bos_id)
    assert len(found) == 2000 and set(unpacked) == set(range(100))
    assert len(unpacked) < 130


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "rows.parquet", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingResource, match=r"pip install 'cabochon\[data\]'"):
        open_source(str(path), 16)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingResource, match=r"pip install 'cabochon\[data\]'"):
        open_source("hf:someone/texts", 16)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table at all", None])
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = write_table(tmp_path / "rows.parquet", [{"text": "a tree"}] * 100)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(BadInput, match="not a sound Parquet file"):
        open_source(str(path), 16)


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("rows.csv", "a,b\n", UsageError, "names end with .jsonl"),
        ("rows.jsonl.zst", "x", UsageError, "names end with .jsonl"),
        ("rows.parquet.gz", "x", UsageError, "names end with .jsonl"),
        ("rows.json", '\n [{"text": "a"}]', BadInput, "jq -c"),
        ("rows.jsonl", "\n\r\n", BadInput, "has no rows"),
    ],
)
def test_a_file_that_cannot_be_rows(
    tmp_path: Path, name: str, content: str, error: type[Exception], match: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=match):
        open_source(str(tmp_path / name), 16)


def test_what_is_not_there(tmp_path: Path, jsonl: Writer) -> None:
    jsonl("chats.jsonl", [{"text": "a"}])
    with pytest.raises(MissingResource, match=r"did you mean .*chats\.jsonl"):
        open_source(str(tmp_path / "chat.jsonl"), 16)
    with pytest.raises(MissingResource, match="hf:NAME"):
        open_source(str(tmp_path / "nowhere" / "x"), 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no file in it ends with"):
        open_source(str(tmp_path / "empty"), 16)


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the Hub has it, read by the datasets library without a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 3)):
        rows = [{"text": f"the {split} {i}", "id": i} for i in range(count)]
        write_table(folder / f"{split}-00000-of-00001.parquet", rows, group=10)
    return folder


def test_what_the_datasets_library_streams(local_dataset: Path) -> None:
    data = HubDataset(f"hf:{local_dataset}")
    assert [r.row()["text"] for r in data.rows(0)] == [f"the train {i}" for i in range(30)]
    assert [r.place for r in data.rows(28)] == [f"hf:{local_dataset} row 29", f"hf:{local_dataset} row 30"]
    test = HubDataset(f"hf:{local_dataset}::test")
    assert [r.row()["text"] for r in test.rows(1)] == ["the test 1", "the test 2"]


def test_a_streamed_data_set_goes_on_where_it_was(local_dataset: Path, tokenizer: Tokenizer,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("cabochon.data.supply.WINDOW", 8)
    config = DataConfig(sources=(f"hf:{local_dataset}",), epochs=2)

    def opened(world: int) -> Ranks:
        return Ranks(config, tokenizer, rows=4, length=16, world=world)

    with opened(1) as ranks:
        plain = ranks.batches()
    texts = [f"the train {i}" for i in range(30)]
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    wanted = sorted(expected(i, [True] * len(i)) for i in ids)
    found = documents(plain, tokenizer.bos_id)
    assert sorted(found) == sorted(wanted * 2) and found != wanted * 2
    for stop in range(0, len(plain), 3):
        with opened(2) as ranks:
            first = ranks.batches(stop)
            state = json.loads(json.dumps(ranks.state()))
        with opened(4) as ranks:
            ranks.restore(state)
            rest = ranks.batches()
        assert [b.tolist() for b in first + rest] == [b.tolist() for b in plain]


class Breaking:
    """Rows of which the last ones never arrive."""

    repeats = True

    def rows(self, skip: int) -> Iterator[Record]:
        yield from (Record(f"row {i}", i, {"text": "the tree"}, "row") for i in range(skip, 30))
        raise MissingResource("the data cannot be read", "the connection was lost", "try again")


def test_data_that_breaks_off_is_not_taken_for_its_end() -> None:
    supply = Passing(Breaking(), lanes=2, own=[0, 1], seeds=(0,), shuffle=False, epochs=None)
    for lane in (0, 1):
        assert [supply.take(lane) is not None for _ in range(15)] == [True] * 15
        with pytest.raises(MissingResource, match="connection was lost"):
            supply.take(lane)


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d", "hf:/nowhere/at/all", "hf:{}:nothing", "hf:{}::nothing"])
def test_a_data_set_that_is_not_there(source: str, local_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((MissingResource, UsageError)):
        open_source(source.format(local_dataset), 16)


def test_rows_from_a_pipe(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b'{"text": "the tree %d"}\n' % i for i in range(50))

    def piped() -> None:
        reader, writer = os.pipe()
        with os.fdopen(writer, "wb") as file:
            file.write(content)
        monkeypatch.setattr("sys.stdin", os.fdopen(reader))

    config = DataConfig(sources=("-",))
    piped()
    with Ranks(config, tokenizer, rows=2, length=16) as ranks:
        plain = ranks.batches()
    assert len(documents(plain, tokenizer.bos_id)) == 50
    piped()
    with Ranks(config, tokenizer, rows=2, length=16) as ranks:
        ranks.batches(5)
        state = ranks.state()
    piped()
    with Ranks(config, tokenizer, rows=2, length=16) as ranks:
        ranks.restore(state)
        assert [b.tolist() for b in ranks.batches()] == [b.tolist() for b in plain[5:]]


def test_a_process_ends_while_its_input_is_awaited() -> None:
    code = f"""
from pathlib import Path
from cabochon.data.config import DataConfig
from cabochon.data.stream import open_stream
from cabochon.text.tokenizer import load_tokenizer
stream = open_stream(DataConfig(sources=("-",), shuffle=False), load_tokenizer({str(TOKENIZER)!r}), rows=1, length=2)
print(next(stream).num_targets)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"text": "the tree"}\n')
        process.stdin.flush()  # and it stays open
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == b"2\n"


@pytest.mark.parametrize(
    ("fields", "world", "cause"),
    [
        ({"sources": ("-", "x.jsonl")}, 1, "share has to be said"),
        ({"sources": ("-", "x.jsonl"), "weights": (1, 1)}, 1, "standard input comes once"),
        ({"sources": ("-",), "epochs": 2}, 1, "standard input comes once"),
        ({"sources": ("-",)}, 2, "belongs to one process"),
        ({"sources": ("hf:x",), "held_out": 0.1}, 1, "nothing can be held out"),
    ],
)
def test_what_arrives_once_cannot_be_used_in_every_way(
    fields: dict[str, Any], world: int, cause: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError, match=cause):
        open_stream(DataConfig(**fields), tokenizer, rows=2, length=8, world=world)
