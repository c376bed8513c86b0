"""A run in its folder comes to the same on any number of processes, and any number of them goes on with it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cabochon.data.config import DataConfig
from cabochon.model.lora_config import LoraConfig
from cabochon.text.tokenizer import load_tokenizer
from cabochon.train.build import Settings, build
from cabochon.train.config import TrainConfig
from cabochon.train.on_policy import OnPolicy
from cabochon.train.parallel import setup
from cabochon.train.preference_config import PreferenceConfig
from cabochon.train.reward_config import RewardConfig
from cabochon.train.rollout_config import RolloutConfig
from cabochon.train.run import Run
from cabochon.train.teaching import TaughtBy
from cabochon.weights.hub import resolve
from cabochon.weights.save import save_model
from several import together
from support import SMALL, relative_error, small_model

TRAIN = {"steps": 6, "rows": 8, "length": 24, "warmup_steps": 0, "optimizer": "adamw", "learning_rate": 1e-2,
         "precision": "float32", "ema": 0.7, "schedule": "constant", "save_every": 2, "log_every": 1}  # fmt: skip


class Gone(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders with the same model and the same rows."""

    def made(name: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / name
        tokenizer = load_tokenizer(resolve(None))
        model = small_model(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), size=0.1)
        save_model(model, folder / "start", tokenizer_files=tokenizer.files(), dtype=dtype)
        rows = [{"text": f"{i} and {j} " * (1 + (i * j) % 9)} for i in range(12) for j in range(5)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return made


def run_of(folder: Path, changes: dict[str, Any], tensor_parallel: int = 1, **settings: Any) -> Run:
    """A run over `folder / rows.jsonl` from the model in `folder / start`, into `folder / out`."""
    ranks = setup("cpu", tensor_parallel)
    data = DataConfig(sources=(str(folder / "rows.jsonl"),), held_out=0.2)
    train = TrainConfig(**(TRAIN | changes))
    chosen = {"name": "start", "out": folder / "out", "dtype": "float32"} | settings
    return build(Settings(model=folder / "start", train=train, data=data, **chosen), ranks=ranks)


def go(folder: Path, changes: dict[str, Any], tensor_parallel: int = 1, gone_at: int = 99) -> int | None:
    return until_gone(run_of(folder, changes, tensor_parallel), gone_at)


def until_gone(run: Run, gone_at: int) -> int | None:
    """Run to the end, or to the step at which the process is gone."""
    step = run.trainer.step

    def watched(*arguments: Any) -> Any:
        if run.trainer.step_number == gone_at:
            raise Gone
        return step(*arguments)

    run.trainer.step = watched
    try:
        return run.go()
    except Gone:
        return None


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [record.get("loss", record.get("eval_loss")) for record in records]


def assert_same(ours: Path, theirs: Path, name: str = "model.safetensors") -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    values = load_file(ours / "out" / name)
    for key, expected in load_file(theirs / "out" / name).items():
        assert relative_error(values[key], expected) < 5e-4, key  # AdamW makes much of the rounding of small gradients


@pytest.mark.parametrize("sharded", [False, True])
def test_any_number_goes_on(start: Callable[..., Path], sharded: bool) -> None:
    alone, shared = start("alone", torch.bfloat16), start("shared", torch.bfloat16)
    settings = {"sharded_checkpoints": sharded}
    assert go(alone, settings) == 0
    assert together(2, go, shared, settings, 1, 3) == [None] * 2
    assert len(list((shared / "out" / "checkpoints" / "000002").glob("part-*"))) == 2 * sharded
    assert together(4, go, shared, settings, 2, 5) == [None] * 4
    assert go(shared, settings) == 0
    assert_same(shared, alone)


def go_with_adapters(folder: Path, merged: bool, gone_at: int = 99) -> int | None:
    adapter = LoraConfig(rank=3, dora=True)
    return until_gone(run_of(folder, {}, adapter=adapter, merged=merged), gone_at)


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters(start: Callable[..., Path], merged: bool) -> None:
    alone, shared = start("alone"), start("shared")
    assert go_with_adapters(alone, merged) == 0
    assert together(2, go_with_adapters, shared, merged, 99 if merged else 3) == [0 if merged else None] * 2
    assert go_with_adapters(shared, merged) == 0
    assert_same(shared, alone, "model.safetensors" if merged else "adapter_model.safetensors")


def go_with_a_teacher(folder: Path) -> int | None:
    return run_of(folder, {}, teachers=(TaughtBy(folder / "teacher", "teacher"),)).go()


def add_teacher(*folders: Path) -> None:
    tokenizer = load_tokenizer(resolve(None))
    shape = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, num_layers=2, hidden_size=32)
    for folder in folders:
        save_model(small_model(shape, seed=7), folder / "teacher", tokenizer_files=tokenizer.files())


@pytest.mark.slow
def test_a_live_teacher(start: Callable[..., Path]) -> None:
    alone, shared = start("alone"), start("shared")
    add_teacher(alone, shared)
    assert go_with_a_teacher(alone) == 0
    assert together(2, go_with_a_teacher, shared) == [0] * 2
    assert_same(shared, alone)


def go_on_policy(folder: Path) -> int | None:
    prompts = DataConfig(sources=(str(folder / "prompts.jsonl"),))
    written = OnPolicy(prompts=prompts, share=0.7, rollouts=RolloutConfig(prompts_per_step=4, max_new_tokens=8))
    return run_of(folder, {"length": 32}, teachers=(TaughtBy(folder / "teacher", "teacher"),), on_policy=written).go()


def test_each_rank_answers_its_own_prompts(start: Callable[..., Path]) -> None:
    alone, shared = start("alone"), start("shared")
    add_teacher(alone, shared)
    for folder in (alone, shared):
        rows = [{"prompt": f"What is {i} + 1?"} for i in range(10)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go_on_policy(alone) == 0
    assert together(2, go_on_policy, shared) == [0] * 2
    assert_same(shared, alone)


def go_preferring(folder: Path, online: bool) -> int | None:
    train = PreferenceConfig(**(TRAIN | {"length": 64, "ema": 0.0, "beta": 0.5}))
    settings: dict[str, Any] = {"data": DataConfig(sources=(str(folder / "pairs.jsonl"),), shape="preference")}
    if online:
        how = RolloutConfig(prompts_per_step=4, samples=3, max_new_tokens=8)
        written = OnPolicy(prompts=DataConfig(sources=(str(folder / "pairs.jsonl"),)), rollouts=how)
        settings |= {"on_policy": written, "rewards": RewardConfig(reward=("length:20",))}
    chosen = Settings(
        model=folder / "start", name="start", out=folder / "out", dtype="float32", train=train, **settings
    )
    return build(chosen, ranks=setup("cpu")).go()


@pytest.mark.parametrize("online", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preferences(start: Callable[..., Path], online: bool) -> None:
    alone, shared = start("alone"), start("shared")
    for folder in (alone, shared):
        rows = [{"prompt": f"{i} + 1", "chosen": str(i + 1) * (1 + i % 3), "rejected": "no"} for i in range(60)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go_preferring(alone, online) == 0
    assert together(2, go_preferring, shared, online) == [0] * 2
    assert_same(shared, alone)
    told = [[json.loads(line) for line in (f / "out" / "log.jsonl").read_text().splitlines()] for f in (alone, shared)]
    for one, other in zip(*told, strict=True):
        for name in ("accuracy", "margin", "chosen_reward", *(("reward", "decided") if online else ())):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
