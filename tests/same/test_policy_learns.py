"""The model inside, asked at a temperature at which it often errs, learns from a verifiable reward to err less."""

import json
import random
from pathlib import Path

import pytest

from cabochon.cli.main import main
from cabochon.data.miniature import arithmetic


@pytest.mark.slow
def test_the_reward_for_right_sums_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    asked = [arithmetic.draw(draw) for _ in range(16)]  # all of them every other step: none is harder than before
    rows = [{"prompt": problem.question(way), "answer": problem.result} for problem, way in asked]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--prompts sums.jsonl --reward exact --steps 16 --prompts-per-step 8 --samples 8 --max-new-tokens 80"
        " --length 192 --sample-temperature 1.5 --beta 0.01 --learning-rate 8e-4 --beta2 0.95 --warmup-steps 2"
        " --log-every 1"
    )
    assert main(["train", "policy", *flags.split(), "--out", "run"]) == 0
    rewards = [json.loads(line)["reward"] for line in Path("run/log.jsonl").read_text().splitlines()]
    before, after = (
        sum(rewards[:4]) / 4,
        sum(rewards[8:]) / 8,
    )  # 256 and 512 answers: 0.03 is the error of the difference
    assert after > before + 0.05, rewards
