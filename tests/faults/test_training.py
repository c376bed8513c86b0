"""A run that is killed, stopped, out of disk or damaged goes on to the bytes of one that was not."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cabochon.cli.main import main
from cabochon.lm import load
from pretraining import FLAGS, STEPS, pretrain, said, write_start

EXACT = ("model.safetensors", "optimizer.safetensors", "average.safetensors", "random.safetensors")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model to start from, rows, and a run that nothing happened to, `whole`."""
    folder = tmp_path_factory.mktemp("begun")
    write_start(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert finished(started("whole"))[0] == 0
    return folder


@pytest.fixture
def work(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, a copy of that."""
    shutil.copytree(begun, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def started(out: str, script: str = "", *more: str) -> subprocess.Popen[str]:
    """The same in a process of its own, after some Python."""
    arguments = ["train", "pretrain", "start", *FLAGS.split(), "--out", out, *more]
    code = f"import sys; from cabochon.cli.main import main\n{script}\nsys.exit(main({arguments!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ONE_THREAD
    )


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def log(out: str) -> list[dict[str, Any]]:
    path = Path(out, "log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(out: str, whole: str) -> None:
    """Two runs ended with the same bytes, and tell the same story."""
    last = f"checkpoints/{STEPS:06d}"
    assert Path(out, "model.safetensors").read_bytes() == Path(whole, "model.safetensors").read_bytes()
    for name in EXACT:
        assert Path(out, last, name).read_bytes() == Path(whole, last, name).read_bytes(), name
    told = [[(r["step"], r.get("loss")) for r in log(run)] for run in (out, whole)]
    assert told[0] == told[1] and len(told[0]) == STEPS
    assert sorted(p.name for p in Path(out).iterdir()) == sorted(p.name for p in Path(whole).iterdir())
    assert sorted(p.name for p in Path(out, "checkpoints").iterdir()) == [f"{STEPS - 3:06d}", f"{STEPS:06d}"]


@pytest.fixture
def whole(work: Path) -> str:
    """The run that nothing happened to."""
    return "whole"


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_with_the_same_bytes(work: Path, whole: str) -> None:
    draw, kills = random.Random(4), 0
    for _ in range(60):
        process, seen = started("run"), len(log("run"))
        wanted = seen + draw.randint(1, 6)
        while process.poll() is None and len(log("run")) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)  # in a step, in a save, while the log is written
        process.kill()
        code, _ = finished(process)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    assert kills >= 3
    same("run", whole)


def test_killed_between_its_last_checkpoint_and_its_result_it_leaves_nothing_behind(work: Path, whole: str) -> None:
    shutil.copytree(whole, "run")
    shutil.copytree(f"run/checkpoints/{STEPS - 3:06d}", f"run/checkpoints/{STEPS - 6:06d}")  # not yet removed
    Path("run/config.json").unlink()  # the result's last file
    assert finished(started("run"))[0] == 0
    same("run", whole)
    Path("run/.result/model").mkdir(parents=True)  # its files were moved to where they belong
    assert finished(started("run"))[0] == 0
    same("run", whole)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before the rename", marks=pytest.mark.slow),
        "after the rename",
        pytest.param("in a file", marks=pytest.mark.slow),
        pytest.param("while old ones go", marks=pytest.mark.slow),
    ],
)
def test_killed_during_a_save(work: Path, whole: str, moment: str) -> None:
    """The second checkpoint is what the process dies in."""
    dies = {  # a checkpoint renames twice: the model in it, and itself
        "before the rename": ("files", "_swap", 4, False),
        "after the rename": ("files", "_swap", 4, True),
        "in a file": ("checkpoint", "write_facts", 2, False),
        "while old ones go": ("checkpoint", "remove_old", 3, False),
    }
    module, name, count, after = dies[moment]
    script = f"""
import os, signal
from cabochon.base import files
from cabochon.train import checkpoint
real, calls = {module}.{name}, []
def dying(*args):
    calls.append(1)
    if len(calls) == {count} and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args)
    if len(calls) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
{module}.{name} = dying
"""
    assert finished(started("run", script))[0] == -signal.SIGKILL
    code, err = finished(started("run"))
    assert code == 0 and "going on from run/checkpoints/00000" in err
    same("run", whole)


def test_killed_while_the_result_is_put_into_place(work: Path, whole: str) -> None:
    script = """
import os, signal
from pathlib import Path
real = Path.replace
def dying(path, target):
    if Path(target).name == "config.json" and path.parent.parent.name == ".result":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)
Path.replace = dying
"""
    assert finished(started("run", script))[0] == -signal.SIGKILL
    assert not Path("run/config.json").exists()  # it does not look whole
    assert finished(started("run"))[0] == 0
    same("run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves(work: Path, whole: str, number: signal.Signals) -> None:
    process = started("run")
    while len(log("run")) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    told = time.monotonic()
    code, err = finished(process)
    assert code == 128 + number and "stopped and saved at step" in err
    assert time.monotonic() - told < 10
    step = int(re.search(r"saved at step (\d+)", err)[1])
    assert Path(f"run/checkpoints/{step:06d}").is_dir()
    assert finished(started("run"))[0] == 0
    same("run", whole)


def test_a_damaged_checkpoint_is_passed_over(work: Path, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, "run")
    for name in ("config.json", "model.safetensors"):
        Path("run", name).unlink()
    newest = Path("run/checkpoints") / f"{STEPS:06d}"
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert finished(started("run"))[0] == 0
    same("run", whole)
    (newest / "training.json").write_text("{")
    Path("run/config.json").unlink()
    code, err = finished(started("run"))
    assert code == 0 and "passed over" in err and f"step {STEPS - 3} of" in err
    same("run", whole)


def test_a_full_disk_keeps_what_there_was(work: Path, whole: str) -> None:
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk: run as root")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 1_200_000)  # the first checkpoint fits, two do not
        code, err = finished(started("disk/run"))
        assert code == 4, err
        assert re.search(r"^error: the checkpoint disk/run/checkpoints/\d+ was not written$", err, re.MULTILINE), err
        assert "No space left" in err and "Traceback" not in err
        assert [p.name for p in Path("disk/run/checkpoints").iterdir()] == ["000003"]
        ballast.unlink()
        shutil.copytree("disk/run", "run")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert finished(started("run"))[0] == 0
    same("run", whole)


def test_two_processes_do_not_share_a_folder(work: Path, whole: str) -> None:
    waiting = """
import os, time
from cabochon.train.log import Log
real = Log.add
def wait(log, record):
    real(log, record)
    while not os.path.exists("seen"):
        time.sleep(0.01)
Log.add = wait
"""
    first = started("run", waiting)
    while not log("run"):
        time.sleep(0.01)
        assert first.poll() is None
    code, err = finished(started("run"))
    Path("seen").touch()
    assert code == 2 and "another process is at work" in err
    assert finished(first)[0] == 0
    same("run", whole)


def test_a_disk_that_fills_up_between_checkpoints(work: Path, whole: str) -> None:
    """The log is what cannot be written."""
    script = """
import errno, os
from cabochon.train.log import Log
real = Log.add
def full(log, record):
    if record["step"] == 5:
        os.remove(log.path)
        os.symlink("/dev/full", log.path)
    real(log, record)
Log.add = full
"""
    code, err = finished(started("run", script))
    assert code == 4 and "log.jsonl was not written" in err and "No space left" in err and "Traceback" not in err
    Path("run/log.jsonl").unlink()
    Path("run/log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in log("whole")[:3]))
    assert finished(started("run"))[0] == 0
    same("run", whole)


def test_a_signal_during_an_evaluation(work: Path) -> None:
    script = """
import os, signal
from cabochon.train import loop
real = loop.token_losses
def told(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
loop.token_losses = told
"""
    code, err = finished(started("run", script, "--held-out", "0.5", "--eval-every", "5"))
    assert code == 128 + signal.SIGTERM and "saved at step 5" in err
    assert not any("eval_loss" in record for record in log("run"))
    code, err = finished(started("run", script, "--held-out", "0.5", "--eval-every", "5"))
    assert code == 128 + signal.SIGTERM and "saved at step 5" in err  # there it is tried again
    assert finished(started("run", "", "--held-out", "0.5", "--eval-every", "5"))[0] == 0
    assert [r["step"] for r in log("run") if "eval_loss" in r] == [5, 10, 15, 20, 24]


def test_a_signal_during_the_last_evaluation(work: Path) -> None:
    script = """
import os, signal
from cabochon.train import loop
real = loop.token_losses
def told(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
loop.token_losses = told
"""
    code, err = finished(started("run", script, "--held-out", "0.5"))
    assert code == 128 + signal.SIGTERM and f"saved at step {STEPS}" in err
    assert not Path("run/config.json").exists()
    assert finished(started("run", "", "--held-out", "0.5"))[0] == 0
    assert [r["step"] for r in log("run") if "eval_loss" in r] == [STEPS]
    assert Path("run/config.json").exists()


def test_what_was_killed_in_a_save_goes_with_the_next_one(work: Path, whole: str) -> None:
    shutil.copytree(whole, "run")
    shutil.rmtree(f"run/checkpoints/{STEPS:06d}")
    Path("run/config.json").unlink()
    Path("run/checkpoints/.000019.abc.partial").mkdir()
    Path("run/checkpoints/.000019.abc.partial/model.safetensors").write_bytes(b"half")
    assert finished(started("run"))[0] == 0
    assert not list(Path("run/checkpoints").glob(".*"))
    same("run", whole)


def test_a_folder_with_something_else_in_it(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("years of work")
    assert "something else in it (thesis.tex)" in said(capsys, pretrain("run"), 2)
    assert "is a file" in said(capsys, pretrain("rows.jsonl"), 2)
    assert Path("run/thesis.tex").read_text() == "years of work"


def test_a_run_goes_on_only_with_its_settings(work: Path, whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = said(capsys, pretrain(whole, "--beta2", "0.9"), 2)
    assert "other settings" in err and "beta2 was 0.98 and is 0.9" in err
    assert "holds a run already" in said(capsys, pretrain(whole, "--resume", "never"), 2)
    assert pretrain(whole, "--micro-rows", "1") == 0  # what does not decide the result may differ
    assert "whole is done" in capsys.readouterr().err


def test_the_settings_of_a_run_make_it_again(work: Path, whole: str) -> None:
    assert main(["train", "pretrain", "--config", "whole/settings.toml", "--out", "run"]) == 0
    a, b = (load_file(f"{run}/model.safetensors") for run in ("run", whole))
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-2) for name in a)  # another number of threads
    assert Path("run/settings.toml").read_text() == Path("whole/settings.toml").read_text()


def test_settings_that_toml_writes_otherwise(work: Path) -> None:
    rows = 'red "\U0001f534"\x7f\u00e9.jsonl'
    Path("rows.jsonl").rename(rows)
    few = "--steps 1 --rows 1 --length 16 --max-grad-norm inf --out".split()
    assert main(["train", "pretrain", "start", "--data", rows, *few, "one"]) == 0
    assert main(["train", "pretrain", "--config", "one/settings.toml", "--out", "two"]) == 0
    assert tomllib.loads(Path("two/settings.toml").read_text()) | {"data": [rows], "max_grad_norm": math.inf} == (
        tomllib.loads(Path("one/settings.toml").read_text())
    )


def test_what_is_written_is_loaded_by_everyone(work: Path, whole: str) -> None:
    """Also the checkpoint is a model."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(10, 30)[None]
    for folder in (whole, f"{whole}/checkpoints/{STEPS:06d}"):
        ours = load(folder, dtype="float32", device="cpu").logits(ids)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        assert torch.allclose(ours, theirs(ids).logits, atol=1e-4)
