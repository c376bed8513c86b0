"""`cabochon train dpo`: a run that is killed ends with the bytes of one that was not; bad input is said."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cabochon.cli.main import main
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder
from dying import killed_at

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=64,
)  # fmt: skip
FLAGS = (
    "--data pairs.jsonl --steps 16 --rows 4 --length 32 --log-every 1 --save-every 4 --precision float32"
    " --learning-rate 1e-3 --warmup-steps 2"
)

LORA = "--lora-rank", "2", "--lora-dropout", "0.1", "--merge-adapters"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model to start from and pairs."""
    init_folder(CONFIG, tmp_path / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [{"prompt": f"{i} + {j} = ", "chosen": str(i + j), "rejected": "none"} for i in range(12) for j in range(5)]
    write("pairs.jsonl", rows, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]], folder: Path = Path()) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def dpo(out: str, *more: str) -> int:
    return main(["train", "dpo", "start", *FLAGS.split(), "--out", out, *more])


def log(out: str) -> list[dict[str, Any]]:
    path = Path(out, "log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Before the first checkpoint, and behind the second.
@pytest.mark.parametrize(("adapters", "steps"), [((), (3, 9)), pytest.param(LORA, (9,), marks=pytest.mark.slow)])
def test_killed_it_ends_with_the_same_bytes(work: Path, adapters: tuple[str, ...], steps: tuple[int, ...]) -> None:
    assert dpo("whole", *adapters) == 0
    for step in steps:
        command = ["train", "dpo", "start", *FLAGS.split(), "--out", "run", *adapters]
        assert killed_at(step, command) == -signal.SIGKILL
    assert dpo("run", *adapters) == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    told = [[(r["step"], r["loss"], r["margin"]) for r in log(run)] for run in ("run", "whole")]
    assert told[0] == told[1] and len(told[0]) == 16


def test_what_a_run_tells(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpo("run", "--held-out", "0.2") == 0
    err = capsys.readouterr().err
    assert "accuracy" in err and "chosen reward" in err and "held out: loss" in err
    *steps, last = log("run")
    assert steps[-1]["accuracy"] == 1 and steps[-1]["margin"] > 0.2 > steps[0]["margin"]
    assert last["eval_accuracy"] == 1 and last["eval_loss"] < 0.6
    assert dpo("run", "--held-out", "0.2") == 0 and "is done" in capsys.readouterr().err
    assert dpo("run", "--held-out", "0.2", "--beta", "0.2") == 2 and "beta was 0.1" in capsys.readouterr().err


def test_rows_that_are_no_pairs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("pairs.jsonl", [{"text": "alone"}])
    assert dpo("run") == 3 and "it has no 'chosen'" in capsys.readouterr().err
    assert dpo("run", "--shape", "text") == 2 and "leave out --shape" in capsys.readouterr().err
    write("pairs.jsonl", [{"prompt": "1", "chosen": "2", "rejected": ""}])
    assert dpo("run") == 3 and "'rejected' is empty" in capsys.readouterr().err


def test_flags_that_make_no_sense(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpo("run", "--beta", "-1") == 2 and "beta cannot be -1" in capsys.readouterr().err
    assert dpo("run", "--bet", "1") == 2 and "did you mean --beta" in capsys.readouterr().err
    assert not Path("run").exists()
