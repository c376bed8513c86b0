"""`cabochon teacher-logits` through the real command, with the model inside."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cabochon.cli import teacher_logits as command_module
from cabochon.cli.teacher_logits import Shown
from cabochon.data.pack import IGNORED
from cabochon.data.teacher import open_teacher
from cabochon.data.teacher_format import fingerprint, position_bytes
from cabochon.data.teacher_index import Totals
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.teacher_logits import Stored
from cabochon.weights.hub import built_in

Command = Callable[..., Any]
SMALL = ("--rows", "2", "--length", "48", "--k", "8")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"The capital of France is Paris, {n}."}) for n in range(40)))
    return path


def test_the_likeliest_ids(command: Command, texts: Path, tmp_path: Path) -> None:
    result = command("teacher-logits", "--data", str(texts), "--out", str(tmp_path / "t"), *SMALL)
    assert (result.code, result.out) == (0, f"{tmp_path / 't'}\n"), result.err
    assert "nats of KL lost" in result.err and "tokens/s" in result.err
    with open_teacher(tmp_path / "t", rows=2, epochs=1) as stream:
        facts, totals = stream.index.facts, stream.index.totals
        assert sum(one.num_targets for one in stream) == totals.tokens > 300
    assert (facts.kind, facts.k, facts.vocab_size, facts.length, facts.teacher) == ("top-k", 8, 4096, 48, "tiny")
    assert facts.tokenizer == fingerprint(load_tokenizer(built_in()))
    assert totals.kl_lost > 0 and 0 < totals.left_out < totals.tokens


def test_a_sample_of_chats_as_json(command: Command, tmp_path: Path) -> None:
    """Only the model's turns are counted, and only what is counted is stored."""
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join([json.dumps({"messages": chat})] * 9))
    options = ("--sampled", "--temperature", "1.5", "--weights", "int8", "--seed", "3", "--json")
    result = command("teacher-logits", "--data", str(data), "--out", str(tmp_path / "t"), *SMALL, *options)
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["kind"], told["temperature"], told["kl_lost"]) == ("sampled", 1.5, 0)
    assert told["per_token"]["bytes"] > position_bytes(8, 4096) and told["data"]["seed"] == 3
    with open_teacher(tmp_path / "t", rows=1, epochs=1) as stream:
        rows = list(stream)
    assert sum(row.num_targets for row in rows) == told["tokens"]
    assert all((row.targets == IGNORED).sum() > row.num_targets for row in rows)
    assert all(row.weights is not None and not row.weights[row.targets == IGNORED].any() for row in rows)


def test_what_is_held_out_is_not_stored(command: Command, texts: Path, tmp_path: Path) -> None:
    told = []
    for share in ("0", "0.5"):
        options = ("--held-out", share, "--overwrite", "--json")
        result = command("teacher-logits", "--data", str(texts), "--out", str(tmp_path / "t"), *SMALL, *options)
        told.append(json.loads(result.out)["tokens"])
    assert 0.4 < told[1] / told[0] < 0.6


def test_only_so_many_steps(command: Command, texts: Path, tmp_path: Path) -> None:
    result = command(
        "teacher-logits", "--data", str(texts), "--out", str(tmp_path / "t"), *SMALL, "--steps", "3", "--json"
    )
    assert json.loads(result.out)["rows"] == 6


def test_standard_input_is_read_once(texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cabochon", "teacher-logits", "--data", "-", "--out", str(tmp_path / "t"), *SMALL]
    done = subprocess.run([*command, "--json"], input=texts.read_bytes(), capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] > 300, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--k", "0"], 2, "--k cannot be 0"),
        (["--rows", "0"], 2, "--rows cannot be 0"),
        (["--length", "-1"], 2, "--length cannot be -1"),
        (["--k", "4097"], 2, "it has 4096 ids"),
        (["--length", "1025"], 2, "context of 1024"),
        (["--temperature", "0"], 2, "not positive"),
        (["--eval-data", "x"], 2, "--eval-data has no effect"),
        (["--steps", "-1"], 2, "steps"),
        (["--data", "no/such.jsonl"], 4, "no/such.jsonl"),
        (["--sample"], 2, "did you mean --sampled?"),
    ],
    ids=str,
)
def test_refusals(command: Command, texts: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    given = [] if "--data" in arguments else ["--data", str(texts)]
    result = command("teacher-logits", "--out", str(tmp_path / "t"), *given, *arguments)
    assert (result.code, result.out) == (code, ""), result.err
    assert said in result.err and [line.split(":")[0].strip() for line in result.err.splitlines()[-3:]] == [
        "error", "cause", "hint",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_no_data_and_a_target_in_use(command: Command, texts: Path, tmp_path: Path) -> None:
    assert "there is no data" in command("teacher-logits", "--out", str(tmp_path / "t")).err
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").touch()
    result = command("teacher-logits", "--data", str(texts), "--out", str(tmp_path / "t"), *SMALL)
    assert result.code == 2 and "not empty" in result.err
    assert command("teacher-logits", "--data", str(texts), "--out", str(texts)).code == 2


def test_a_disk_that_is_too_small_is_seen_first(
    command: Command, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr("cabochon.train.teacher_logits.say", lambda *_, **__: pytest.fail("it was begun"))
    result = command("teacher-logits", "--data", str(texts), "--out", str(tmp_path / "t"), *SMALL)
    assert result.code == 4 and "what is to be stored takes" in result.err and "--k" in result.err


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock, moved = [100.0], []
    monkeypatch.setattr(command_module.time, "perf_counter", lambda: clock[0])
    shown = Shown(moved.append, 9, size=50)
    for batches, now in ((3, 110.0), (4, 130.0), (5, 175.0), (6, 180.0)):
        clock[0] = now
        shown(Stored(batches, Totals(tokens=100, kl_lost=2.0)))
    # The first three were an earlier process's, which no speed follows from.
    assert moved == [3, 1, 1, 1] and shown.rate == pytest.approx(3 * 50 / 70)
    assert capsys.readouterr().err == "batch 5/9  2 tokens/s  KL lost 0.0200\n"
