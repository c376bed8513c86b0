"""`cabochon train policy`: from prompts and rewards to a model that answers better."""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import HubOptions, Json, Model
from cabochon.cli.train import run_training
from cabochon.cli.train_options import AdapterOptions, RunOptions
from cabochon.data.config import DataConfig
from cabochon.train.policy_config import GroupConfig, PolicyConfig
from cabochon.train.reward_config import RewardConfig

Optimise = Annotated[PolicyConfig, Parameter(name="*", group="Training")]
Answers = Annotated[GroupConfig, Parameter(name="*", group="Answers")]
Worth = Annotated[RewardConfig, Parameter(name="*", group="What answers are worth")]

FAR = 1.0  # nats per token from its reference, where a policy mostly says something else


@Parameter(name="*", group="Prompts")
@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is answered."""

    prompts: Annotated[
        tuple[str, ...], Parameter(negative="", help="Rows with `prompt` or `messages`, and whatever rewards ask for.")
    ] = ()
    epochs: Annotated[int, Parameter(help="How often each is answered, where --steps is left out.")] = 1
    shuffle: Annotated[bool, Parameter(help="In an order of the seed's, another in each epoch.")] = True
    fold_system: Annotated[
        bool, Parameter(negative="", help="Put system messages before the first user message; Gemma 2 has none.")
    ] = False
    max_bad_rows: Annotated[int, Parameter(help="Rows that cannot be used before the run stops.")] = 10

    def config(self, train: PolicyConfig) -> DataConfig:
        """For the data pipeline. Raises `UsageError` when nothing is asked."""
        if not self.prompts:
            raise UsageError("there is nothing to answer", "no prompts are given", "add --prompts prompts.jsonl")
        return DataConfig(
            sources=self.prompts,
            epochs=self.epochs,
            shuffle=self.shuffle,
            fold_system=self.fold_system,
            max_bad_rows=self.max_bad_rows,
            seed=train.seed,
        )


def policy(
    model: Model = None,
    *,
    run: RunOptions,
    prompts: PromptOptions = PromptOptions(),
    rewards: Worth = RewardConfig(),
    answers: Answers = GroupConfig(),
    train: Optimise = PolicyConfig(),
    adapters: AdapterOptions = AdapterOptions(),
    json: Json = False,
    hub: HubOptions = HubOptions(),
) -> int:
    """Learn from rewards: the model answers prompts, and answers that were better than others become likelier.

    REINFORCE, RLOO or GRPO, with PPO's clipping where one answer serves several steps. Held to the model that the run
    starts from, or to a moving average of itself. A run that was stopped goes on when the same command is given again.

    Example: cabochon train policy --prompts sums.jsonl --reward exact --steps 200 --out runs/policy

    Example: cabochon train policy mine --prompts p.jsonl --reward rewards.py:polite --reward length:400 --out runs/own
    """
    if not rewards.reward:
        raise UsageError("answers cannot be told apart", "no reward is named", "add --reward exact, or another one")
    from cabochon.train.on_policy import OnPolicy

    parts = run, prompts, rewards, answers, train, adapters
    asked = {name: value for part in parts for name, value in asdict(part).items()}
    rows = prompts.config(train)
    written = OnPolicy(prompts=rows, rollouts=answers)
    code = run_training(
        model, run, train, json, hub, asked, data=rows, adapters=adapters, on_policy=written, rewards=rewards
    )
    if not code:
        _note_far(run.out.expanduser())
    return code


def _note_far(out: Path) -> None:
    """Say that the policy went far from its reference, where no budget stopped it, and what there is from before."""
    from cabochon.train.checkpoint import before
    from cabochon.train.log import read

    far = next((record for record in read(out / "log.jsonl") if (record.get("kl") or 0) > FAR), None)
    if far and os.environ.get("RANK", "0") == "0":
        found = before(out, far["step"])
        told = f"{found} is from before" if found else "no checkpoint is left from before"
        said = f"at step {far['step']} the KL divergence was {far['kl']:.3g} nats per token; {told}"
        print(f"note: {said}, and --kl-budget stops such a run", file=sys.stderr)
