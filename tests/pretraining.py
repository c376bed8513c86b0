"""A small run of `cabochon train pretrain` for the tests: a model to start from, rows, the command, what it says."""

import json
from pathlib import Path

import pytest

from cabochon.cli.main import main
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=64,
)  # fmt: skip
STEPS = 24
FLAGS = (
    f"--data rows.jsonl --steps {STEPS} --rows 4 --length 32 --log-every 1 --save-every 3 --precision float32 --ema 0.9"
)


def write_start(folder: Path) -> None:
    """`start`, a model with random weights, and `rows.jsonl`."""
    init_folder(CONFIG, folder / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [{"text": f"{i} and {j} make {i + j}. " * (1 + (i * j) % 5)} for i in range(30) for j in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pretrain(out: str, *more: str) -> int:
    """Its exit code."""
    return main(["train", "pretrain", "start", *FLAGS.split(), "--out", out, *more])


def said(capsys: pytest.CaptureFixture[str], code: int, expected: int) -> str:
    """What an error says, once it has three lines."""
    err = capsys.readouterr().err
    assert code == expected, err
    lines = [line for line in err.splitlines() if line.startswith(("error:", "  cause:", "  hint:"))]
    assert len(lines) == 3 and "Traceback" not in err
    return err
