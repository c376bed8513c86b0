"""Data that is broken in every way: counted, quoted with its place, and refused before work is lost."""

import gzip
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cabochon.base.errors import BadInput, UsageError
from cabochon.data.config import DataConfig
from cabochon.data.stream import BatchStream, open_stream
from cabochon.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
TOKENIZER = load_tokenizer(GOLDEN)
GOOD = b'{"text": "the red house"}'
CHAT = b'{"messages": [{"role": "user", "content": "the tree"}, {"role": "assistant", "content": "sings"}]}'
SYSTEM = CHAT.replace(b"[", b'[{"role": "system", "content": "Be brief."}, ', 1)
REASONS = {
    b"{": "not JSON",
    b"\xff\xfe": "not UTF-8",
    b"[]": "this is a list",
    b"null": "this is null",
    b'{"other": 1}': "no 'text'",
    b'{"text": null}': "no 'text'",
    b'{"text": 1}': "not a text",
    b'{"text": ""}': "empty",
    b'{"text": "\\ud800"}': "not valid Unicode",
    b'{"text": ["a"]}': "not a text",
    b"\x00": "not JSON",
}
BAD = list(REASONS)


def write(path: Path, lines: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def opened(path: Path, **fields: Any) -> BatchStream:
    shape = {"rows": 2, "length": fields.pop("length", 16)}
    return open_stream(DataConfig(sources=(str(path),), **({"epochs": 1} | fields)), TOKENIZER, **shape)


def test_bad_rows_are_counted_quoted_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [line for bad in BAD for line in (GOOD, bad)])
    with opened(path, epochs=3, max_bad_rows=len(BAD), shuffle=False) as stream:
        for _ in stream:
            pass
        assert stream.bad_rows == len(BAD)  # those of later epochs are the same ones
        assert stream.documents == 3 * len(BAD)
        quoted = dict(line.removeprefix(f"{path}:").split(": ", 1) for line in stream.complaints)
    assert len(quoted) == 5 and all(int(line) % 2 == 0 for line in quoted)
    assert all(re.search(REASONS[BAD[int(line) // 2 - 1]], reason) for line, reason in quoted.items())


def test_what_was_skipped_or_cut_is_told(tmp_path: Path) -> None:
    long = CHAT.replace(b"sings", b"sings " * 40)
    path = write(tmp_path / "rows.jsonl", [CHAT, long, b"{", CHAT])
    with opened(path, length=32) as stream:
        assert stream.remarks() == []
        for _ in stream:
            pass
        skipped, cut = stream.remarks()
    assert skipped.startswith(f"1 bad row skipped: {path}:3: not JSON")
    assert cut == "1 of 3 documents were longer than 32 tokens and cut"


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_row_too_many_stops_the_run(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD] * 500 + BAD)
    with opened(path, max_bad_rows=3, shuffle=False, workers=workers) as stream:
        given = 0
        with pytest.raises(BadInput) as error:
            for _ in stream:
                given += 1
        assert given > 50  # what was made before is not lost
        with pytest.raises(BadInput):
            next(stream)
    first, cause, hint = str(error.value).splitlines()
    # Each thread stops at the row that it finds to be one too many.
    assert re.fullmatch(f"error: the data has {4 if workers == 1 else '[45]'} bad rows, and 3 may be skipped", first)
    assert cause.count(f"{path}:50") >= 4
    assert "--max-bad-rows" in hint


@pytest.mark.parametrize("prefetch", [0, 3])
def test_what_an_error_interrupted_is_made_after_a_restart(tmp_path: Path, prefetch: int) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD] * 300 + BAD + [GOOD] * 300)
    with opened(path, max_bad_rows=100) as stream:
        wanted = [batch.ids.tolist() for batch in stream]
    with opened(path, max_bad_rows=3, workers=2, prefetch=prefetch) as stream:
        found = []
        with pytest.raises(BadInput, match="bad rows"):
            for batch in stream:
                found.append(batch.ids.tolist())
        with pytest.raises(BadInput, match="bad rows"):
            next(stream)
        state = stream.state()
    with opened(path, max_bad_rows=100) as stream:
        stream.restore(state)
        found += [batch.ids.tolist() for batch in stream]
    assert found == wanted


def test_bad_rows_before_a_restart_count_after_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD[:4], *[GOOD] * 200, *BAD[4:8]])
    with opened(path, shuffle=False, max_bad_rows=7) as stream:
        next(stream)
        state = json.loads(json.dumps(stream.state()))
        assert stream.bad_rows == 4
    with opened(path, shuffle=False, max_bad_rows=7) as stream:
        stream.restore(state)
        with pytest.raises(BadInput, match="8 bad rows"):
            for _ in stream:
                pass


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != b"[]"])  # which begins a JSON list
def test_data_of_which_nothing_fits_is_refused_at_once(tmp_path: Path, bad: bytes) -> None:
    path = write(tmp_path / "rows.jsonl", [bad] * 3)
    with pytest.raises(BadInput) as error:
        opened(path, max_bad_rows=1000)
    assert f"{path}:1" in error.value.cause or "keys are 'other'" in error.value.cause


def test_too_many_bad_rows_at_the_beginning_are_seen_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD[:3], GOOD])
    with pytest.raises(BadInput, match="3 bad rows, and none may be skipped"):
        opened(path, max_bad_rows=0)


def test_system_messages_have_a_hint_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [SYSTEM] * 3)
    with pytest.raises(BadInput, match="--fold-system"):
        opened(path, length=64)
    with opened(path, length=64, fold_system=True) as stream:
        assert sum(batch.num_targets for batch in stream) > 0
    mixed = write(tmp_path / "mixed.jsonl", [CHAT] * 200 + [SYSTEM] * 11)
    with opened(mixed, length=64, shuffle=False) as stream, pytest.raises(BadInput, match="--fold-system"):
        for _ in stream:
            pass


def test_rows_shorter_than_every_prompt_have_nothing_to_learn(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [CHAT])
    with pytest.raises(BadInput, match="nothing to learn is in its first 4 tokens"):
        opened(path, length=4)


def test_endless_data_that_turns_out_to_be_useless_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.data.lane.PATIENCE", 200)
    monkeypatch.setattr("cabochon.data.prepare.LOOKED_AT", 1)
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD])
    fields = {"max_bad_rows": 100, "held_out": 0.5, "epochs": None, "seed": _seed_that_holds_out_the_first()}
    with opened(path, **fields) as stream, pytest.raises(BadInput, match="no row of the data can be used"):
        next(stream)


def _seed_that_holds_out_the_first() -> int:
    from cabochon.data.order import held_out

    return next(seed for seed in range(100) if 0 in held_out(len(BAD) + 1, 0.5, seed))


def test_a_model_without_turns_cannot_learn_chats(tmp_path: Path) -> None:
    vocabulary = json.loads((GOLDEN / "tokenizer.json").read_text())
    text = json.dumps(vocabulary).replace("<start_of_turn>", "<start_of_nothing>")
    (tmp_path / "tokenizer.json").write_text(text)
    path = write(tmp_path / "rows.jsonl", [CHAT])
    config = DataConfig(sources=(str(path),))
    with pytest.raises(BadInput, match="this model cannot chat"):
        open_stream(config, load_tokenizer(tmp_path), rows=1, length=64)


def test_preferences_are_not_mixed_with_anything_else(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [b'{"prompt": "a", "chosen": "b", "rejected": "c"}'])
    texts = write(tmp_path / "texts.jsonl", [GOOD])
    with pytest.raises(UsageError, match="do not go together"):
        open_stream(DataConfig(sources=(str(pairs), str(texts))), TOKENIZER, rows=1, length=64)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sources": ()}, "no data"),
        ({"weights": (0.5, 0.5)}, "1 sources"),
        ({"weights": (-1.0,)}, "above 0"),
        ({"weights": (float("nan"),)}, "above 0"),
        ({"weights": (1.0,), "epochs": 2}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": -0.1}, "held_out"),
        ({"held_out": float("nan")}, "held_out"),
        ({"held_out": 0.1, "eval_sources": ("y",)}, "eval_sources"),
        ({"max_bad_rows": -1}, "max_bad_rows"),
        ({"workers": 0}, "workers"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        DataConfig(**({"sources": ("x",)} | fields))


def test_nothing_is_left_when_all_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(BadInput, match="all 1 documents are held out"):
        opened(path, held_out=0.5)


def test_a_file_cut_short_in_the_middle_of_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD] * 5000)
    with opened(path) as stream:
        next(stream)
        path.write_bytes(GOOD)
        with pytest.raises(BadInput, match="changed while it was in use"):
            for _ in stream:
                pass


def test_a_table_with_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"the red house {i * 7919 % 1000}"} for i in range(4000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xaa" * 200
    path.write_bytes(content)
    with opened(path, shuffle=False) as stream, pytest.raises(BadInput, match="not a sound Parquet file"):
        for _ in stream:
            pass


def test_no_room_to_unpack(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + b"\n") * 100_000))
    code = f"""
from cabochon.data.sources import open_source
try:
    open_source({str(path)!r}, 16)
except Exception as error:
    print(error)
"""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=little_room)
    assert f"error: {path} cannot be unpacked" in run.stdout and "TMPDIR" in run.stdout
