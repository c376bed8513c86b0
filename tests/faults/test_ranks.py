"""A run of several processes that lose one, are stopped, or find the disk full: it goes on to the same end."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cabochon.base.errors import CabochonError
from cabochon.data.config import DataConfig
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.build import Settings, build
from cabochon.train.config import TrainConfig
from cabochon.train.parallel import setup
from cabochon.train.run import Run
from cabochon.weights.hub import resolve
from cabochon.weights.save import save_model
from several import together
from support import SMALL, relative_error, small_model

STEPS = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model to start from, and rows."""
    tokenizer = load_tokenizer(resolve(None))
    model = small_model(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), size=0.1)
    save_model(model, tmp_path / "start", tokenizer_files=tokenizer.files())
    rows = [{"text": f"{i} and {j} " * (1 + (i * j) % 9)} for i in range(12) for j in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(folder: Path, out: str, *more: str) -> list[str]:
    flags = f"--data rows.jsonl --steps {STEPS} --rows 4 --length 24 --log-every 1 --save-every 4 --precision float32"
    flags += f" --warmup-steps 0 --optimizer adamw --learning-rate 0.003 --save-dtype float32 --out {out}"
    return ["-m", "cabochon", "train", "pretrain", "start", *flags.split(), *more]


def started(folder: Path, world: int, *arguments: str) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)] if world > 1 else []
    return subprocess.Popen(
        [sys.executable, *launch, *command(folder, *arguments)],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def losses(out: Path) -> list[float]:
    log = out / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    for _ in range(2400):
        if len(losses(out)) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture
def expected(folder: Path) -> Path:
    """The run of one process that nothing happened to."""
    alone = started(folder, 1, "alone")
    said, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, said
    return folder / "alone"


def assert_same(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    values = load_file(ours / "model.safetensors")
    for name, wanted in load_file(theirs / "model.safetensors").items():
        assert relative_error(values[name], wanted) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--sharded-checkpoints",)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(folder: Path, expected: Path, victim: int, more: tuple[str, ...]) -> None:
    out = folder / "out"
    run = started(folder, 2, "out", *more)
    wait_for_step(run, out, 10)
    os.kill(children(run)[victim], signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "error: training stopped: another process of the run is gone" in said
    again = started(folder, 2, "out", *more)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "note: going on from" in said
    assert_same(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--sharded-checkpoints",)])
def test_a_stopped_run(folder: Path, expected: Path, more: tuple[str, ...]) -> None:
    out = folder / "out"
    run = started(folder, 2, "out", *more)
    wait_for_step(run, out, 6)
    os.kill(children(run)[1], signal.SIGTERM)  # the others hear of it from this one
    said, _ = run.communicate(timeout=60)
    assert "stopped and saved at step" in said
    done = len(losses(out))
    assert (out / "checkpoints" / f"{done:06d}").is_dir()
    again = started(folder, 1, "out", *more)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"step {done} of {STEPS}" in said
    assert_same(out, expected)


# A full disk


def small_run(folder: Path, sharded: bool) -> Run:
    train = TrainConfig(
        steps=6, rows=4, length=24, warmup_steps=0, precision="float32", save_every=2, sharded_checkpoints=sharded
    )
    data = DataConfig(sources=(str(folder / "rows.jsonl"),))
    settings = Settings(model=folder / "start", name="start", out=folder / "out", train=train, data=data)
    return build(settings, ranks=setup("cpu"))


def on_a_full_disk(folder: Path, sharded: bool, rank: int) -> list[str]:
    """What the run ends with when one process cannot write large files after the first checkpoint."""
    run = small_run(folder, sharded)
    step = run.trainer.step

    def filled(*arguments: Any) -> Any:
        if run.ranks.rank == rank and run.trainer.step_number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return step(*arguments)

    run.trainer.step = filled
    try:
        return [str(run.go())]
    except CabochonError as error:
        return [type(error).__name__, error.what, error.cause]


def to_the_end(folder: Path, sharded: bool) -> int:
    return small_run(folder, sharded).go()


@pytest.mark.parametrize(("sharded", "rank"), [(False, 0), (True, 1)])
def test_a_full_disk(folder: Path, sharded: bool, rank: int) -> None:
    first, second = together(2, on_a_full_disk, folder, sharded, rank, seconds=60)
    assert first[0] == "MissingResource"
    assert first[1].endswith("checkpoints/000004 was not written")
    assert "File too large" in first[2]
    assert second[0] == "Elsewhere"
    assert sorted(path.name for path in (folder / "out" / "checkpoints").iterdir()) == ["000002"]
    assert together(2, to_the_end, folder, sharded) == [0, 0]
    assert sorted(path.name for path in (folder / "out" / "checkpoints").iterdir()) == ["000004", "000006"]
