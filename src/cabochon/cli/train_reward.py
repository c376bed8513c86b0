"""`cabochon train reward`: from pairs of answers to a model that says how good an answer is."""

from dataclasses import asdict, replace
from typing import Annotated

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubOptions, Json, Model
from cabochon.cli.train import run_training
from cabochon.cli.train_options import DataOptions, RunOptions
from cabochon.train.reward_model_config import RewardModelConfig

Learn = Annotated[RewardModelConfig, Parameter(name="*", group="Training")]


def reward(
    model: Model = None,
    *,
    run: RunOptions,
    data: DataOptions = DataOptions(),
    train: Learn = RewardModelConfig(),
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn to tell the better of two answers: rows with prompt, chosen and rejected. The result is a reward.

    With --held-out or --eval-data it is said how often the model is right, and how well it knows how often. A run that
    was stopped goes on when the same command is given again.

    Example: cabochon train reward google/gemma-2-2b-it --data pairs.jsonl --held-out 0.05 --out runs/reward
    """
    if data.shape not in ("auto", "preference"):
        raise UsageError(
            f"rows of shape {data.shape} cannot be compared", "there are two answers in each", "leave out --shape"
        )
    asked = asdict(run) | asdict(data) | asdict(train)
    rows = replace(data, shape="preference").config(train)
    return run_training(model, run, train, json, hub, asked, data=rows)
