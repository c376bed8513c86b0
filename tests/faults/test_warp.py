"""`cabochon warp`: killed anywhere it ends with the bytes of a run that was not; what is refused at once."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from cabochon.cli.main import main
from cabochon.cli.policies import Trainer
from cabochon.model.config import Gemma2Config
from cabochon.recipe.warp import Policy
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=64,
)  # fmt: skip
TOLD = """
model = "start"
steps = 6
iterations = 2
held_out = ["prompts.jsonl"]
held_out_samples = 1
etas = [0.0, 0.5, 1.0]
baseline_points = 2
save_dtype = "float32"

[policy]
prompts = ["prompts.jsonl"]
reward = ["length:20"]
length = 48
max_new_tokens = 8
prompts_per_step = 2
samples = 3
log_every = 1
save_every = 2
precision = "float32"
learning_rate = 1e-3
warmup_steps = 1
"""
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model to start from, prompts and a configuration."""
    init_folder(CONFIG, tmp_path / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [{"prompt": f"What is {n} + 1?"} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "warp.toml").write_text(TOLD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def warp(out: str, *more: str) -> "Iterator[subprocess.Popen[str]]":
    """The command in a process that does not outlive the block."""
    arguments = ["warp", "warp.toml", out, "--baseline", "--device", "cpu", *more]
    command = [sys.executable, "-m", "cabochon", *arguments]
    with subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def whole(out: str, *more: str) -> str:
    """Run it to its end; what it says."""
    with warp(out, *more) as process:
        said = process.communicate()[1]
        assert process.returncode == 0, said
        return said


def wait_until(process: "subprocess.Popen[str]", seen: Callable[[], bool]) -> None:
    while not seen():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def planned(out: str) -> list[list[str]]:
    """What `--plan` prints, without the program's name."""
    with redirect_stdout(StringIO()) as said:
        assert main(["warp", "warp.toml", out, "--baseline", "--device", "cpu", "--plan"]) == 0
    return [shlex.split(line)[1:] for line in said.getvalue().splitlines()]


def lines(path: str) -> int:
    """How many a file has."""
    return Path(path).read_bytes().count(b"\n") if Path(path).exists() else 0


def same(out: str, whole: str) -> None:
    """Every model of two runs, and what was measured of them."""
    names = sorted(str(path.relative_to(whole)) for path in Path(whole).rglob("model.safetensors"))
    assert len(names) == 11  # four policies, two slerps, one liti, the plain run with two checkpoints, the result
    for name in names:
        assert Path(out, name).read_bytes() == Path(whole, name).read_bytes(), name
    assert Path(out, "front.json").read_bytes() == Path(whole, "front.json").read_bytes()


KILLS: list[tuple[tuple[str, ...], Callable[[], bool]]] = [
    # Both policies are behind a checkpoint and before their ends.
    (("--parallel", "2"), lambda: all(lines(f"run/iteration-1/policy-{n}/log.jsonl") > 2 for n in (1, 2))),
    # One policy of the second iteration is there, and another is not.
    ((), lambda: Path("run/iteration-2/policy-1/config.json").exists()),
    # Parts of the front are measured.
    (("--parallel", "2"), lambda: lines("run/front.jsonl") > 1),
]


@pytest.mark.slow
def test_killed_side_by_side_or_by_hand_it_ends_with_the_same_bytes(work: Path) -> None:
    whole("whole")
    for more, seen in KILLS:
        with warp("run", *more) as process:
            wait_until(process, seen)
            process.kill()  # the policies that are being trained die with it
        assert process.returncode == -signal.SIGKILL
    whole("run", "--parallel", "2")
    same("run", "whole")
    # The same by hand, as on several machines.
    while commands := planned("hand"):
        for command in reversed(commands):
            assert main(command) == 0
    assert main(["warp", "warp.toml", "hand", "--baseline", "--device", "cpu"]) == 0
    same("hand", "whole")


@pytest.mark.slow
def test_a_signal_saves_what_is_trained(work: Path) -> None:
    with warp("run", "--parallel", "2") as process:
        wait_until(process, lambda: lines("run/iteration-1/policy-1/log.jsonl") > 0)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in said
    assert "policy-1: step 1/6" in said
    assert list(Path("run/iteration-1/policy-1/checkpoints").iterdir())


@pytest.mark.parametrize("parallel", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_policy_that_fails_says_so_itself(work: Path, capfd: pytest.CaptureFixture[str], parallel: str) -> None:
    Path("warp.toml").write_text(TOLD + "kl_budget = 1e-9\n")
    assert main(["warp", "warp.toml", "run", "--parallel", parallel]) == 3
    said = capfd.readouterr().err
    name = "policy-1: " if parallel == "2" else ""
    assert f"\n{name}  cause: --kl-budget 1e-09 allows no more\n" in said.replace("policy-2", "policy-1")
    assert "is the last one before" in said


def test_what_is_left_as_commands(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands of one iteration at a time: what comes before is merged by then."""
    assert main(["warp", "warp.toml", "run", "--plan", "--baseline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = "run/iteration-1/policy-"
    wanted = [f"cabochon train policy start --config {place}{n}.toml --out {place}{n}" for n in (1, 2)]
    assert lines[:2] == wanted and lines[2].endswith("--out run/baseline") and len(lines) == 3
    told = [Path(f"{place}{n}.toml").read_text() for n in (1, 2)]
    assert 'reference = "ema"' in told[0] and told[0] == told[1].replace("seed = 1", "seed = 0")
    assert 'reference = "start"' in Path("run/baseline.toml").read_text()
    for n in (1, 2):  # as if they were trained
        shutil.copytree("start", f"{place}{n}")
    second = planned("run")
    assert [command[2:4] for command in second[:2]] == [["run/iteration-1/liti", "--config"]] * 2
    assert second[2][-1] == "run/baseline" and Path("run/iteration-1/liti/model.safetensors").exists()


def test_without_ray(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["warp", "warp.toml", "run", "--ray"]) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: there is no Ray here\n") and "pip install 'cabochon[ray]'" in err
    assert not Path("run").exists()
    assert main(["warp", "warp.toml", "run", "--ray", "--ray-gpus", "-1"]) == 2


def test_flags_come_as_they_were_told(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "start", tmp_path / "out", seed=3, steps=5)
    told = {"reward": ['format:\U0001f600 \\d+ "x"\n'], "beta": 1e-05, "shuffle": False}
    command = Trainer(told, [{}]).command(policy)
    assert tomllib.loads(Path(command[command.index("--config") + 1]).read_text()).items() >= told.items()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("iterations", "itertions", "did you mean iterations?"),
        ("iterations = 2", "iterations = 0", "at least 1"),
        ("iterations = 2", 'iterations = "two"', "iterations"),
        ("samples = 3", "sample = 3", "did you mean samples?"),
        ("samples = 3", "samples = 0", "at least 1"),
        ("samples = 3", "samples = 1", "compares answers"),
        ('["length:20"]', "[]", "it has no reward"),
        ('["length:20"]', '["lenght:20"]', "did you mean length?"),
        ('prompts = ["prompts.jsonl"]\n', "", "it has no prompts"),
        ("[policy]", "[policies]", "no table [policy]"),
        ("length = 48", "length = 48\nseed = 3", "cannot have seed"),
        ('["prompts.jsonl"]\nheld_out_samples', '["nowhere.jsonl"]\nheld_out_samples', "no such file"),
        ("steps = 6", "steps = [6, 5, 4]", "2 iterations"),
        ("[policy]", "[policy", "not TOML"),
    ],
)
def test_what_is_refused_before_anything_runs(
    work: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    assert before in TOLD
    Path("warp.toml").write_text(TOLD.replace(before, after, 1))
    assert main(["warp", "warp.toml", "run"]) in (2, 3, 4)
    assert said in capsys.readouterr().err
    assert not list(Path().glob("run/*"))


def test_a_folder_of_something_else(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warp", "warp.toml", "start"]) == 2 and "something else in it" in capsys.readouterr().err
    assert main(["warp", "warp.toml", "prompts.jsonl"]) == 2 and "it is a file" in capsys.readouterr().err
    assert main(["warp", "missing.toml", "run"]) == 4 and "cannot be read" in capsys.readouterr().err
    assert main(["warp", "warp.toml", "run", "--parallel", "-1"]) == 2
