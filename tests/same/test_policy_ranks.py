"""A policy in several processes comes to what one process comes to: each answers its own prompts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cabochon.data.config import DataConfig
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.build import Settings, build
from cabochon.train.log import read
from cabochon.train.on_policy import OnPolicy
from cabochon.train.parallel import setup
from cabochon.train.policy_config import PolicyConfig
from cabochon.train.reward_config import RewardConfig
from cabochon.train.rollout_config import RolloutConfig
from cabochon.weights.hub import built_in
from cabochon.weights.save import save_model
from several import together
from support import SMALL, relative_error, small_model


def go(folder: Path, changes: dict[str, Any]) -> int | None:
    """Train in `folder`."""
    train = PolicyConfig(
        steps=3, length=48, warmup_steps=0, optimizer="adamw", learning_rate=1e-3, precision="float32", log_every=1,
        **changes,
    )  # fmt: skip
    how = RolloutConfig(prompts_per_step=4, samples=3, max_new_tokens=8)
    prompts = DataConfig(sources=(str(folder / "prompts.jsonl"),))
    chosen = Settings(
        model=folder / "start", name="start", out=folder / "out", dtype="float32", train=train, data=prompts,
        on_policy=OnPolicy(prompts=prompts, rollouts=how), rewards=RewardConfig(reward=("length:20",)),
    )  # fmt: skip
    return build(chosen, ranks=setup("cpu")).go()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two with the same model and the same prompts."""
    tokenizer = load_tokenizer(built_in())
    model = small_model(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), size=0.1)
    made = [tmp_path / "alone", tmp_path / "shared"]
    for folder in made:
        save_model(model, folder / "start", tokenizer_files=tokenizer.files())
        rows = [{"prompt": f"What is {i} + 1?"} for i in range(10)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"estimator": "rloo", "advantage_scale": "batch"}, id="batch"),
        pytest.param({"estimator": "grpo", "kl_budget": 9.0}, id="grpo", marks=pytest.mark.slow),
        pytest.param({"estimator": "reinforce"}, id="reinforce", marks=pytest.mark.slow),
    ],
)
def test_each_rank_answers_its_own_prompts(folders: list[Path], changes: dict[str, Any]) -> None:
    alone, shared = folders
    assert go(alone, changes) == 0
    assert together(2, go, shared, changes) == [0] * 2
    for one, other in zip(read(alone / "out/log.jsonl"), read(shared / "out/log.jsonl"), strict=True):
        for name in ("loss", "reward", "kl", "entropy", "length", "cut", "failed"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    ours, theirs = (load_file(folder / "out/model.safetensors") for folder in folders)
    for name, wanted in theirs.items():
        assert relative_error(ours[name], wanted) < 5e-4, name  # AdamW makes much of the rounding of small gradients
