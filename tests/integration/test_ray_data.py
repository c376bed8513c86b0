"""`cabochon generate-dataset --ray` on a Ray of two machines' size: killed, gone on with, and with an engine killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cabochon.lm import LM
from cabochon.lm.dataset import Dataset
from servers import wait_until

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
COUNT, SIZE = 100, 2
SAMPLING = {"max_new_tokens": 60, "temperature": 1.0, "seed": 7}
CLUSTER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "token-of-a-test", "RAY_USAGE_STATS_ENABLED": "0"}
FLAGS = ["--size", str(SIZE), "--ray", "2", "--max-new-tokens", "60", "--temperature", "1", "--seed", "7"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray that outlives the commands, as one of many machines does."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    # A short path, for its sockets. Only there does Ray note where it listens, so that no other command finds it.
    home = tempfile.mkdtemp(prefix="ray-")
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--num-gpus=0",
               "--include-dashboard=false", f"--object-store-memory={100 * 2**20}", f"--temp-dir={home}"]  # fmt: skip
    environment = {**os.environ, **CLUSTER, "OMP_NUM_THREADS": "1"}
    ray = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port))
        yield f"127.0.0.1:{port}"
    finally:
        family = [*psutil.Process(ray.pid).children(recursive=True), psutil.Process(ray.pid)]
        ray.terminate()
        _, left = psutil.wait_procs(family, 5)
        for process in left:
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them asks nothing, and one does not fit."""
    rows: list[dict[str, Any]] = [{"prompt": f"Tell me a story about {number} cats."} for number in range(COUNT)]
    rows[5], rows[6] = {"text": "no prompt"}, {"prompt": "x" * 9000}
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def expected(lm: LM, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files as one engine in this process writes them."""
    out = tmp_path_factory.mktemp("one") / "out"
    dataset = Dataset(sources=[str(prompts)], out=str(out), size=SIZE, sampling=SAMPLING)
    for part in dataset.missing():
        dataset.answer(lm, part)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("part-*.jsonl"))}


@contextmanager
def generating(prompts: Path, out: Path, address: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs."""
    environment = {**os.environ, **CLUSTER, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    command = [BIN / "cabochon", "generate-dataset", str(prompts), str(out), *FLAGS, "--json", *flags]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answered(out: Path, process: subprocess.Popen[str], count: int) -> None:
    """Wait for so many files."""
    wait_until(lambda: process.poll() is not None or len(files(out)) >= count, 300)
    assert process.poll() is None, process.communicate()[1]


def engines() -> list[psutil.Process]:
    """The processes below this one that have an engine, which are called after what they do at the moment."""
    return [p for p in psutil.Process().children(recursive=True) if "MapBatches(Worker)" in " ".join(named(p))]


def named(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_what_was_killed_goes_on(address: str, prompts: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """The command is killed, then given again and loses an engine: nothing is lost, doubled or answered twice."""
    out = tmp_path / "out"
    with generating(prompts, out, address) as process:
        answered(out, process, 6)
        assert len(engines()) == 2
        process.kill()
    wait_until(lambda: not engines())  # Ray ends them; what they are writing is written or not there
    before, stamps = files(out), {file.name: file.stat().st_mtime_ns for file in out.glob("part-*.jsonl")}
    assert 6 <= len(before) < len(expected)
    assert before.items() <= expected.items()

    with generating(prompts, out, address) as process:
        answered(out, process, len(before) + 4)
        min(engines(), key=lambda engine: engine.pid).kill()
        said, complaints = process.communicate(timeout=500)
        assert process.returncode == 0, complaints
    assert json.loads(said) == {"folder": str(out), "files": len(expected) - len(before)}
    assert files(out) == expected
    assert {name: (out / name).stat().st_mtime_ns for name in before} == stamps
    lines = [json.loads(line) for content in files(out).values() for line in content.splitlines()]
    assert [line["index"] for line in lines] == list(range(COUNT))
    assert [line["index"] for line in lines if line["answer"] is None] == [5, 6]

    with generating(prompts, out, address) as process:  # there is nothing left to do
        assert json.loads(process.communicate(timeout=100)[0])["files"] == 0


def test_ctrl_c_ends_it(address: str, prompts: Path, tmp_path: Path) -> None:
    with generating(prompts, tmp_path / "out", address) as process:
        answered(tmp_path / "out", process, 1)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in complaints
    wait_until(lambda: not engines())


@pytest.mark.parametrize(
    ("where", "flags", "said"),
    [
        (None, ["--model", "/nowhere/model"], "error: no model in '/nowhere/model'"),
        ("127.0.0.1:1", [], "error: Ray has failed"),
        ("local", ["--ray-gpus", "8"], "error: Ray has no room for this"),
    ],
)
def test_what_a_user_can_mend(
    address: str, prompts: Path, tmp_path: Path, where: str | None, flags: list[str], said: str
) -> None:
    with generating(prompts, tmp_path / "out", where or address, *flags) as process:
        output, complaints = process.communicate(timeout=200)
    assert process.returncode == 4 and not output
    assert said in complaints and "Traceback" not in complaints
