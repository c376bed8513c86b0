"""A teacher that is being stored when the process dies or the disk fills up is gone on with, to the same bytes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cabochon.base.errors import MissingResource, UsageError
from cabochon.data.config import DataConfig
from cabochon.data.stream import open_stream
from cabochon.data.teacher import open_teacher
from cabochon.data.teacher_format import fingerprint
from cabochon.data.teacher_index import TeacherFacts, TeacherIndex
from cabochon.lm import LM, load
from cabochon.train import teacher_logits
from cabochon.train.teacher_logits import Stored, store_teacher

ROWS, LENGTH = 2, 32

# Stores the model inside, sampled, two shards for every three batches; says what is done; slow enough to be killed.
STORE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from test_storing_teachers import store

def report(stored):
    print(stored.batches, flush=True)
    time.sleep(0.02)

store(Path(sys.argv[1]), Path(sys.argv[2]), report)
"""


def store(
    source: Path, out: Path, report: Callable[[Stored], None] = lambda _: None, lm: LM | None = None
) -> TeacherIndex:
    lm = lm or load(dtype="float32")
    config = DataConfig(sources=(str(source),), epochs=1)
    facts = TeacherFacts(
        kind="sampled", k=6, vocab_size=lm.config.vocab_size, temperature=1.0, length=LENGTH, teacher="tiny",
        tokenizer=fingerprint(lm.text_tokenizer), data=config.settled(),
    )  # fmt: skip
    with open_stream(config, lm.text_tokenizer, rows=ROWS, length=LENGTH) as stream:
        return store_teacher(lm.model, stream, out, facts, key={}, seed=7, shard_bytes=4500, report=report)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = (json.dumps({"text": f"Number {n} is the {n}th. " * (n % 7 + 1)}) for n in range(60))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out when nothing happens."""
    out = tmp_path_factory.mktemp("whole") / "t"
    assert len(store(source, out).shards) > 8
    return out


def equal(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def started(source: Path, out: Path) -> "subprocess.Popen[bytes]":
    package = Path(teacher_logits.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{package}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", STORE, str(source), str(out), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=env)


def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    reached = []
    for kill_at, delay in ((3, 0.0), (4, 0.013), (5, 0.029)):
        with started(source, out) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            for _ in range(kill_at):
                process.stdout.readline()
            time.sleep(delay)
            process.kill()
        reached.append(first)
        assert not out.exists()
    assert reached[0] == 0 < reached[1] < reached[2], "nothing was gone on with"
    seen: list[Stored] = []
    store(source, out, seen.append)
    assert seen[0].batches > reached[-1]
    assert equal(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_shard_that_lost_its_end_is_made_again(source: Path, whole: Path, tmp_path: Path) -> None:
    """What a machine without power may leave, whatever was promised."""
    out = tmp_path / "t"
    with started(source, out) as process:
        assert process.stdout is not None
        for _ in range(8):
            process.stdout.readline()
        process.kill()
    shard = next(tmp_path.glob(".t.unfinished/folder/rows-00001*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    store(source, out)
    assert equal(out, whole)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_keeps_what_is_there(source: Path, whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    lm = load(dtype="float32")
    try:
        with pytest.raises(MissingResource, match="No space left") as caught:
            store(source, disk / "t", lm=lm)
        assert "goes on where it stopped" in str(caught.value) and str(caught.value).count("\n") == 2
        assert not (disk / "t").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        seen: list[Stored] = []
        store(source, disk / "t", seen.append, lm)
        assert seen[0].batches > 1
        assert equal(disk / "t", whole)
        with open_teacher(disk / "t", rows=1, epochs=1) as stream:
            assert len(list(stream)) == stream.index.totals.rows
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_at_once_do_not_mix(source: Path, tmp_path: Path) -> None:
    with started(source, tmp_path / "t") as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UsageError, match="another process"):
            store(source, tmp_path / "t")
        process.kill()
