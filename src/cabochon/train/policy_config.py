"""What policy optimisation can be told. Standard library only."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cabochon.base.errors import UsageError
from cabochon.train.config import Schedules, TuneConfig
from cabochon.train.rollout_config import RolloutConfig

Estimator = Literal["reinforce", "rloo", "grpo"]
Scale = Literal["auto", "none", "group", "batch"]
Over = Literal["auto", "sum", "mean", "tokens"]
Place = Literal["auto", "reward", "loss"]
Reference = Literal["start", "ema"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(TuneConfig):
    """How a model learns from rewards for its own answers. Raises `UsageError` for values that make no sense.

    Args:
        estimator: What an answer is compared with: reinforce: earlier answers to whatever; rloo: the other answers to
            the same prompt; grpo: all of them, in units of their standard deviation.
        advantage_scale: Divide advantages by the standard deviation of rewards: of a group, the whole batch, or not.
        over: How an answer's tokens count: sum: all of them, as the estimators are derived; mean: an answer counts as
            much as another of any length; tokens: a token does. auto: mean for grpo, sum for the others.
        beta: What holds the policy to the reference: nats of KL divergence that cost as much as a reward of 1 / BETA.
        kl_in: Where it is taken off: from the reward of each answer, or as a term of each token's loss. auto: loss for
            grpo, reward for the others.
        reference: start: the model that the run starts from. ema: a moving average of the policy itself, as in WARP.
        mu: Of ema: the share of the policy that goes into the average at every step.
        passes: Steps from the same answers; more than 1 needs --clip.
        clip: Tokens that have become likelier or less likely by more than this share teach nothing more (PPO); 0: off.
        length_penalty: Reward that each token of an answer costs.
        kl_budget: Nats per token; where the KL divergence from the reference is above it, the run stops. 0: no limit.
        steps: How many times the weights change; 0: as often as it takes to answer each prompt --epochs times.
        rows: Without effect: there are as many rows as the answers fill.
        length: Tokens of a row; a prompt and its answer have to fit.
        learning_rate: Peak of AdamW. Adapters bear ten times as much.
        spike_factor: Leave out steps whose loss is this many deviations above the last ones; 0: none.
    """

    estimator: Estimator = "rloo"
    advantage_scale: Scale = "auto"
    over: Over = "auto"
    beta: float = 0.1
    kl_in: Place = "auto"
    reference: Reference = "start"
    mu: float = 0.01
    passes: int = 1
    clip: float = 0.0
    length_penalty: float = 0.0
    kl_budget: float = 0.0
    learning_rate: float = 1e-6
    schedule: Schedules = "constant"
    spike_factor: float = 0.0  # this loss is no measure of anything: it is around 0 all the time
    save_every: int = 50  # a policy that goes astray has to have somewhere to go back to

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"estimator": Estimator, "advantage_scale": Scale, "over": Over, "kl_in": Place}
        for name, known in (choices | {"reference": Reference}).items():
            if getattr(self, name) not in get_args(known):
                raise _refused(name, getattr(self, name), f"it is one of {', '.join(get_args(known))}")
        for name in ("beta", "clip", "length_penalty", "kl_budget"):
            if not 0 <= getattr(self, name) < math.inf:
                raise _refused(name, getattr(self, name), "it has to be at least 0")
        if not 0 < self.mu < 1:
            raise _refused("mu", self.mu, "it has to be between 0 and 1")
        if self.passes < 1:
            raise _refused("passes", self.passes, "it has to be at least 1")
        if self.passes > 1 and not self.clip:
            raise _refused("passes", self.passes, "nothing would hold later passes to the first (--clip 0.2)")
        if self.ema:
            raise _refused("ema", self.ema, "the average of a policy is its anchor here: --reference ema --mu 0.01")
        for name in ("label_smoothing", "z_loss"):
            if getattr(self, name):
                raise _refused(name, getattr(self, name), "it is a term of cross-entropy, and this loss has none")

    @property
    def kl_is_in_loss(self) -> bool:
        """Whether `beta` weighs a term of the loss; otherwise it is taken off rewards."""
        return self.kl_in == "loss" or (self.kl_in == "auto" and self.estimator == "grpo")

    @property
    def average(self) -> Literal["sum", "mean", "tokens"]:
        """How an answer's tokens count."""
        return self.over if self.over != "auto" else "mean" if self.estimator == "grpo" else "sum"

    def settled(self) -> dict[str, Any]:
        """See `TrainConfig`; a budget decides only when a run ends."""
        return {name: value for name, value in super().settled().items() if name != "kl_budget"}


@dataclass(frozen=True, kw_only=True)
class GroupConfig(RolloutConfig):
    """Rollouts that are compared with each other.

    Args:
        samples: answers to each prompt; at least 2 for rloo and grpo.
    """

    samples: int = 4


def check_policy(policy: PolicyConfig, rollouts: RolloutConfig) -> None:
    """Raise `UsageError` when the two do not go together."""
    if policy.estimator != "reinforce" and rollouts.samples < 2:
        raise _refused("samples", rollouts.samples, f"{policy.estimator} compares answers to the same prompt")
    if not rollouts.sample_temperature:
        raise _refused("sample_temperature", 0, "all answers to a prompt would be the same, and nothing is learned")


def _refused(name: str, value: object, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
