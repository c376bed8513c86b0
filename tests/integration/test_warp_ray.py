"""WARP's policies as tasks of a local Ray: the same models as from processes of our own, also when a task is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder

pytestmark = pytest.mark.slow
CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=64,
)  # fmt: skip
TOLD = """
model = "start"
steps = 6
iterations = 1
choose = 0.5
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
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model to start from, prompts and a configuration."""
    init_folder(CONFIG, tmp_path / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [{"prompt": f"What is {n} + 1?"} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "warp.toml").write_text(TOLD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def warp(out: str, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "cabochon", "warp", "warp.toml", out, "--device", "cpu", *more]
    # One of its own, whatever else runs on this machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said = process.communicate(timeout=600)[1]
    return process.returncode, said


def wait_for_step(process: "subprocess.Popen[str]", out: str) -> None:
    log = Path(out, "iteration-1/policy-1/log.jsonl")
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_the_same_models(work: Path) -> None:
    code, said = finished(warp("whole"))
    assert code == 0, said
    process = warp("run", "--ray")
    wait_for_step(process, "run")
    # The Ray worker, not only the policy: Ray starts the task again, and that goes on from the checkpoint.
    found = [p for p in psutil.process_iter(["cmdline"]) if "run/iteration-1/policy-1" in (p.info["cmdline"] or ())]
    (worker,) = {p.ppid() for p in found} - {p.pid for p in found}
    os.kill(worker, signal.SIGKILL)
    code, said = finished(process)
    assert code == 0, said
    for name in ("iteration-1/policy-1", "iteration-1/policy-2", "iteration-1/slerp", "model"):
        assert (
            Path("run", name, "model.safetensors").read_bytes() == Path("whole", name, "model.safetensors").read_bytes()
        )


def test_a_policy_that_fails_says_so_itself(work: Path) -> None:
    Path("warp.toml").write_text(TOLD + "kl_budget = 1e-9\n")
    code, said = finished(warp("run", "--ray"))
    assert code == 3 and "  cause: --kl-budget 1e-09 allows no more\n" in said
    code, said = finished(warp("run", "--ray", "--ray-gpus", "99"))
    assert code == 4 and said.splitlines()[-3] == "error: Ray has no room for this"


def test_a_signal_saves_what_is_trained(work: Path) -> None:
    Path("warp.toml").write_text(
        TOLD.replace("steps = 6", "steps = 5000").replace("save_every = 2", "save_every = 5000")
    )
    process = warp("run", "--ray")
    wait_for_step(process, "run")
    process.send_signal(signal.SIGTERM)
    code, said = finished(process)
    assert code == 128 + signal.SIGTERM and "the same command goes on" in said
    assert list(Path("run/iteration-1/policy-1/checkpoints").iterdir())
