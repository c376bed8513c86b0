"""`cabochon train policy`: killed it ends with the bytes of a run that was not; rewards that fail; what is refused."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cabochon.cli.main import main
from cabochon.model.config import Gemma2Config
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.log import read
from cabochon.weights.hub import built_in
from cabochon.weights.init import init_folder
from dying import killed_at

CONFIG = Gemma2Config(
    vocab_size=4096, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64,
    query_pre_attn_scalar=32, sliding_window=16, max_position=64,
)  # fmt: skip
FLAGS = {
    "prompts": "prompts.jsonl", "reward": "rewards.py:vowels", "steps": 12, "length": 48, "max-new-tokens": 8,
    "prompts-per-step": 2, "samples": 3, "log-every": 1, "save-every": 4, "precision": "float32",
    "learning-rate": 1e-3, "warmup-steps": 2, "save-dtype": "float32",
}  # fmt: skip
REWARDS = """
import os, time

def vowels(prompt, completion, row):
    return sum(letter in "aeiou" for letter in completion) / 10

def faulty(prompt, completion, row):
    kind = len(completion) % 5
    if kind == 0: return float("nan")
    if kind == 1: raise RuntimeError("no opinion")
    return vowels(prompt, completion, row)

def hanging(prompt, completion, row):
    if len(completion) % 4 == 0: time.sleep(60)
    return vowels(prompt, completion, row)

def never(prompt, completion, row):
    raise RuntimeError("no opinion at all")
"""
KINDS: dict[str, dict[str, Any]] = {
    "rloo": {},
    "ema": {"reference": "ema", "mu": 0.2, "estimator": "reinforce"},
    "passes": {"passes": 3, "clip": 0.2, "estimator": "grpo"},
    "lora": {"lora-rank": 2, "lora-dropout": 0.1, "merge-adapters": True},
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model to start from, prompts and rewards."""
    init_folder(CONFIG, tmp_path / "start", tokenizer_files=load_tokenizer(built_in()).files())
    rows = [{"prompt": f"What is {i} + {j}?", "answer": i + j} for i in range(4) for j in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(out: str, changed: dict[str, Any]) -> list[str]:
    words = ["train", "policy", "start", "--out", out]
    for name, value in (FLAGS | changed).items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return words


def policy(out: str, changed: dict[str, Any] | None = None) -> int:
    return main(command(out, changed or {}))


def log(out: str) -> list[dict[str, Any]]:
    return read(Path(out, "log.jsonl"))


SLOW = [pytest.param(kind, (6,), marks=pytest.mark.slow) for kind in ("rloo", "ema", "lora")]


# Before the first checkpoint, and behind one between passes.
@pytest.mark.parametrize(("kind", "steps"), [("passes", (2, 6)), *SLOW])
def test_killed_it_ends_with_the_same_bytes(work: Path, kind: str, steps: tuple[int, ...]) -> None:
    assert policy("whole", KINDS[kind]) == 0
    for step in steps:
        assert killed_at(step, command("run", KINDS[kind])) == -signal.SIGKILL
    assert policy("run", KINDS[kind]) == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    told = [[(r["step"], r["loss"], r["reward"], r["kl"]) for r in log(run)] for run in ("run", "whole")]
    assert told[0] == told[1] and len(told[0]) == 12


def test_what_a_run_tells_and_what_it_leads_to(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = {"reward": ["rewards.py:vowels", "length:20"], "reward-weights": [1, 0.5]}
    changed = {"steps": 6, **rewards}
    assert policy("run", changed) == 0
    err = capsys.readouterr().err
    assert "reward" in err and "entropy" in err and "kl" in err
    steps = log("run")
    assert all(Path("run", f"{name}.svg").exists() for name in ("reward", "kl", "entropy", "length"))
    assert {"reward", "reward_vowels", "reward_length", "kl", "entropy", "length", "cut", "failed"} <= steps[0].keys()
    assert steps[0]["reward"] == pytest.approx(steps[0]["reward_vowels"] + 0.5 * steps[0]["reward_length"])
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-4
    assert policy("run", changed | {"beta": 0.2}) == 2
    assert "beta was 0.1" in capsys.readouterr().err
    assert main(["train", "policy", "--config", "run/settings.toml", "--out", "again"]) == 0
    assert log("again")[-1]["reward"] == steps[-1]["reward"]


def test_the_anchor_goes_along_and_the_policy_is_the_result(work: Path) -> None:
    assert policy("run", KINDS["ema"]) == 0
    result, last = load_file("run/model.safetensors"), "run/checkpoints/000012"
    weights, average = load_file(f"{last}/model.safetensors"), load_file(f"{last}/average.safetensors")
    for name, tensor in result.items():
        assert torch.equal(tensor, weights[name])
    assert not torch.equal(average["embedding.weight"], weights["model.embed_tokens.weight"])


def test_rewards_that_fail_or_hang_are_left_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("faulty", {"reward": "rewards.py:faulty"}) == 0
    assert "got no reward and were left out" in capsys.readouterr().err
    assert any(0 < one["failed"] < 1 for one in log("faulty"))
    assert policy("hangs", {"reward": "rewards.py:hanging", "steps": 1, "reward-seconds": 0.2}) == 0
    assert "took more than 0.2 s" in capsys.readouterr().err


def test_too_many_failures_end_the_run_behind_a_checkpoint(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = {"reward": "rewards.py:faulty", "save-every": 0}
    assert policy("run", faulty | {"max-failed-rewards": 6}) == 3
    err = capsys.readouterr().err
    assert "and 6 may" in err and "the last one: faulty: " in err and err.count("\n  ") == 2
    step = len(log("run"))
    assert [path.name for path in Path("run/checkpoints").iterdir()] == [f"{step:06d}"] and 0 < step < 12
    assert policy("run", faulty | {"max-failed-rewards": 1000}) == 0  # the limit may change
    assert "going on from" in capsys.readouterr().err
    assert policy("none", {"reward": "rewards.py:never", "max-failed-rewards": 3}) == 3
    assert "no opinion at all" in capsys.readouterr().err


def test_a_policy_that_goes_astray_stops_and_names_weights_from_before(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert policy("run", {"learning-rate": 0.05, "kl-budget": 0.01, "save-every": 1, "keep": 9}) == 3
    err = capsys.readouterr().err
    assert "--kl-budget 0.01 allows no more" in err and "nats per token" in err
    reached = log("run")[-1]["step"]
    before = Path("run/checkpoints", f"{reached - 1:06d}")
    assert (f"{before} is from before" in err) if reached > 1 else ("started from" in err)
    assert not Path("run/model.safetensors").exists()


def test_a_policy_that_went_far_without_a_budget(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cabochon.cli.train_policy.FAR", 1e-5)
    assert policy("run", {"steps": 4, "save-every": 1, "keep": 9}) == 0
    step = next(record["step"] for record in log("run") if record["kl"] > 1e-5)
    said = f"at step {step} the KL divergence was {log('run')[step - 1]['kl']:.3g} nats per token"
    assert f"note: {said}; run/checkpoints/{step - 1:06d} is from before, and --kl-budget" in capsys.readouterr().err
    assert policy("cautious", {"steps": 1}) == 0 and "--kl-budget" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"samples": 1}, 2, "--samples"), ({"reward": "exct"}, 2, "did you mean exact?"),
        ({"reward": "none.py:f"}, 4, "none.py"), ({"passes": 2}, 2, "--clip"), ({"ema": 0.9}, 2, "--mu"),
        ({"max-new-tokens": 48}, 2, "leave no room"), ({"prompts": "no.jsonl"}, 4, "no.jsonl"),
        ({"reward": "judge:localhost"}, 2, "judge:http"), ({"estimator": "ppo"}, 2, "reinforce"),
        ({"reward-weights": [1, 2]}, 2, "--reward"), ({"sample-temperature": 0}, 2, "nothing is learned"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], code: int, says: str
) -> None:
    assert policy("run", changed) == code
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and not Path("run").exists()


def test_nothing_asked_or_nothing_wanted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "policy", "start", "--reward", "exact", "--out", "run"]) == 2
    assert "--prompts" in capsys.readouterr().err
    assert main(["train", "policy", "start", "--prompts", "prompts.jsonl", "--out", "run"]) == 2
    assert "--reward exact" in capsys.readouterr().err
