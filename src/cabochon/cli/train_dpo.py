"""`cabochon train dpo`: from pairs of answers, given or the model's own, to one that prefers the better ones."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubOptions, Json, Model
from cabochon.cli.train import run_training
from cabochon.cli.train_options import AdapterOptions, DataOptions, RunOptions
from cabochon.train.policy_config import GroupConfig
from cabochon.train.preference_config import PreferenceConfig
from cabochon.train.reward_config import RewardConfig

Prefer = Annotated[PreferenceConfig, Parameter(name="*", group="Training")]
Answers = Annotated[GroupConfig, Parameter(name="*", group="Own answers")]
Worth = Annotated[RewardConfig, Parameter(name="*", group="What answers are worth")]


@Parameter(name="*", group="Own answers")
@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """Whether the model writes what it learns from."""

    prompts: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="What it answers, instead of --data: rows with `prompt` or `messages`."),
    ] = ()


def dpo(
    model: Model = None,
    *,
    run: RunOptions,
    data: DataOptions = DataOptions(),
    online: OnlineOptions = OnlineOptions(),
    answers: Answers = GroupConfig(),
    rewards: Worth = RewardConfig(),
    train: Prefer = PreferenceConfig(),
    adapters: AdapterOptions = AdapterOptions(),
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn from pairs of answers, of which one was preferred: rows with prompt, chosen and rejected.

    With --prompts the pairs are made while it learns: the model answers, and --reward tells its best answer from its
    worst. The model that the run starts from is the reference: with adapters the weights beside them, otherwise a
    frozen copy. A run that was stopped goes on when the same command is given again.

    Example: cabochon train dpo google/gemma-2-2b-it --data pairs.jsonl --lora-rank 16 --out runs/dpo

    Example: cabochon train dpo --prompts sums.jsonl --reward exact --steps 200 --out runs/online
    """
    if data.shape not in ("auto", "preference"):
        raise UsageError(
            f"rows of shape {data.shape} cannot be preferred", "two answers are compared in each", "leave out --shape"
        )
    parts = run, data, online, answers, rewards, train, adapters
    asked = {name: value for part in parts for name, value in asdict(part).items()}
    rows = replace(data, shape="preference", data=data.data or online.prompts).config(train)
    if not online.prompts:
        if rewards != RewardConfig() or answers != GroupConfig():
            raise UsageError(
                "the model writes nothing", "there is nothing to answer", "add --prompts prompts.jsonl, without --data"
            )
        return run_training(model, run, train, json, hub, asked, data=rows, adapters=adapters)
    _check_online(data, rewards)
    from cabochon.train.on_policy import OnPolicy

    written = OnPolicy(prompts=replace(rows, eval_sources=()), rollouts=answers)
    return run_training(
        model, run, train, json, hub, asked, data=rows, adapters=adapters, on_policy=written, rewards=rewards
    )


def _check_online(data: DataOptions, rewards: RewardConfig) -> None:
    if data.data or data.held_out:
        raise UsageError(
            f"--{'data' if data.data else 'held-out'} has no effect here",
            "with --prompts the model writes what it learns from",
            "leave it out; --eval-data evaluates on pairs of others",
        )
    if not rewards.reward:
        raise UsageError("answers cannot be told apart", "no reward is named", "add --reward exact, or another one")
