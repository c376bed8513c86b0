"""On-policy distillation that is killed goes on to the bytes of a run that was not; bad input is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cabochon.cli.main import main
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 64,
    "query_pre_attn_scalar": 32, "sliding_window": 16, "max_position": 96,
}  # fmt: skip
STEPS = 12
FLAGS = (
    f"--teacher teacher --prompts prompts.jsonl --steps {STEPS} --prompts-per-step 3 --samples 2 --max-new-tokens 12 "
    "--rows 4 --length 48 --log-every 1 --save-every 4 --precision float32 --learning-rate 0.01 --warmup-steps 0"
)
MIXED = ("--on-policy", "0.6", "--data", "texts.jsonl")
EXACT = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, prompts and texts, and runs that nothing happened to: `own` and `mixed`."""
    folder = tmp_path_factory.mktemp("begun")
    files = load_tokenizer(built_in()).files()
    init_folder(Gemma2Config(hidden_size=32, **SIZES), folder / "student", tokenizer_files=files)
    init_folder(Gemma2Config(hidden_size=48, **SIZES), folder / "teacher", tokenizer_files=files, seed=1)
    lines(folder / "prompts.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(20)])
    lines(folder / "texts.jsonl", [{"text": f"{i} and {j} make {i + j}. " * 3} for i in range(9) for j in range(9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert finished(started("own"))[0] == 0
        assert finished(started("mixed", "", *MIXED))[0] == 0
    return folder


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def work(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, a copy of that."""
    shutil.copytree(begun, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def started(out: str, script: str = "", *more: str) -> subprocess.Popen[str]:
    """The command in a process of its own, after some Python."""
    arguments = ["train", "distill", "student", *FLAGS.split(), "--out", out, *more]
    code = f"import sys; from cabochon.cli.main import main\n{script}\nsys.exit(main({arguments!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def log(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def dying(place: str, call: int) -> str:
    """Python that kills the process when a function is called so many times."""
    module, _, name = place.rpartition(":")
    owner, _, attribute = name.rpartition(".")
    return f"""
import os, signal
from {module} import {owner}
real, calls = {owner}.{attribute}, []
def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{owner}.{attribute} = dies
"""


@pytest.mark.parametrize(
    ("whole", "place", "call"),
    [
        ("own", "cabochon.generate.engine:Engine.step", 90),  # while answers are written
        ("own", "cabochon.train.step:Trainer.gradients", 6),  # when they are there
        ("mixed", "cabochon.train.step:Trainer.gradients", 9),
    ],
)
def test_killed_it_ends_with_the_same_bytes(work: Path, whole: str, place: str, call: int) -> None:
    more = MIXED if whole == "mixed" else ()
    assert finished(started("run", dying(place, call), *more))[0] == -signal.SIGKILL
    code, err = finished(started("run", "", *more))
    assert code == 0 and "going on from run/checkpoints/00000" in err
    for name in EXACT:
        ours, theirs = (Path(out, f"checkpoints/{STEPS:06d}", name).read_bytes() for out in ("run", whole))
        assert ours == theirs, name
    assert [(r["step"], r["loss"]) for r in log("run")] == [(r["step"], r["loss"]) for r in log(whole)]


def test_what_is_logged(begun: Path) -> None:
    own, mixed = log(str(begun / "own")), log(str(begun / "mixed"))
    assert all(0 < record["answer_tokens"] <= 12 and 0 <= record["cut"] <= 1 for record in own)
    written = ["answer_tokens" in record for record in mixed]
    assert 3 <= sum(written) <= 10  # 0.6 of 12, drawn by the seed
    assert own[-1]["loss"] < own[0]["loss"]


def test_a_stored_teacher_for_the_other_batches(work: Path) -> None:
    stored = ["teacher-logits", "teacher", "--data", "texts.jsonl", "--out", "stored", "--k", "8"]
    assert main([*stored, "--rows", "4", "--length", "48"]) == 0
    more = ("--on-policy", "0.6", "--teacher-logits", "stored")
    assert finished(started("whole", "", *more))[0] == 0
    assert finished(started("run", dying("cabochon.train.step:Trainer.gradients", 9), *more))[0] == -signal.SIGKILL
    assert finished(started("run", "", *more))[0] == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert 0 < sum("cut" in record for record in log("whole")) < STEPS


BAD = [
    ("--prompts gone.jsonl", 4, "gone.jsonl cannot be read"),
    ("--prompts empty.jsonl", 3, "there is no data in empty.jsonl"),
    ("--prompts texts.jsonl", 3, "no prompt"),
    ("--length 20", 3, "have more than 9 tokens"),
    ("--max-new-tokens 48", 2, "leave no room for a prompt"),
    ("--teacher other", 2, "cannot teach this student"),
    ("--on-policy 0", 2, "share of 0.0"),
    ("--on-policy 1.5", 2, "share of 1.5"),
    ("--on-policy 0.5", 2, "no text for the other batches"),
    ("--data texts.jsonl", 2, "--data has no effect here"),
    ("--teacher-share 1 --teacher-share 2", 2, "cannot be mixed"),
    ("--samples 0", 2, "samples cannot be 0"),
]


@pytest.mark.parametrize(("flags", "code", "said"), BAD)
def test_bad_input(work: Path, capsys: pytest.CaptureFixture[str], flags: str, code: int, said: str) -> None:
    Path("empty.jsonl").write_text("")
    if "other" in flags:
        init_folder(Gemma2Config(hidden_size=32, **SIZES | {"vocab_size": 4097}), Path("other"))
    given, changed = FLAGS.split(), flags.split()
    for name in changed[::2]:
        if name in given:
            del given[given.index(name) : given.index(name) + 2]
    assert main(["train", "distill", "student", *given, *changed, "--out", "run"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--on-policy 0.5 --teacher teacher --data texts.jsonl", "the student writes nothing"),
        ("--samples 2 --teacher teacher --data texts.jsonl", "the student writes nothing"),
        ("--prompts prompts.jsonl --teacher-logits stored", "cannot grade"),
        ("--prompts prompts.jsonl", "needs one teacher"),
    ],
)
def test_flags_that_do_not_go_together(work: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    assert main(["train", "distill", "student", *flags.split(), "--steps", "1", "--out", "run"]) == 2
    assert said in capsys.readouterr().err


def test_other_prompts_do_not_go_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished(started("run", dying("cabochon.train.step:Trainer.gradients", 6)))[0] == -signal.SIGKILL
    lines(Path("prompts.jsonl"), [{"prompt": "Something else?"}] * 20)
    assert main(["train", "distill", "student", *FLAGS.split(), "--out", "run"]) == 2
    assert "cannot go on with these prompts" in capsys.readouterr().err
