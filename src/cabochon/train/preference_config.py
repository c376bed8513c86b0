"""What preference optimisation can be told. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from cabochon.base.errors import UsageError
from cabochon.train.config import TuneConfig
from cabochon.train.rollout_config import RolloutConfig

PreferenceLoss = Literal["dpo", "ipo"]


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(TuneConfig):
    """How a model is moved towards the better of two answers. Raises `UsageError` for values that make no sense.

    Args:
        loss: dpo: the logistic loss of the margin. ipo: the squared distance of the margin, per token, from 1/(2 BETA).
        beta: What holds the model to the reference: larger is closer.
        label_smoothing: Share of the pairs that is taken to be labelled the wrong way round. For dpo alone.
        learning_rate: Peak of AdamW. Adapters bear ten times as much.
    """

    loss: PreferenceLoss = "dpo"
    beta: float = 0.1
    learning_rate: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        names = PreferenceLoss.__args__  # type: ignore[attr-defined]
        if self.loss not in names:
            raise _refused("loss", self.loss, f"it is one of {', '.join(names)}")
        if not 0 < self.beta < float("inf"):
            raise _refused("beta", self.beta, "it has to be above 0")
        if not self.label_smoothing < 0.5:
            raise _refused("label_smoothing", self.label_smoothing, "at a half nothing would be learned")
        if self.label_smoothing and self.loss != "dpo":
            raise _refused("label_smoothing", self.label_smoothing, f"{self.loss} has no use for it")
        if self.z_loss:
            raise _refused("z_loss", self.z_loss, "it is a term of cross-entropy, and a loss of pairs has none")


def check_pairs(rollouts: RolloutConfig) -> None:
    """Raise `UsageError` when no answers drawn like this could differ."""
    if rollouts.samples < 2:
        raise _refused("samples", rollouts.samples, "a pair takes two answers to the same prompt")
    if not rollouts.sample_temperature:
        raise _refused("sample_temperature", 0, "all answers to a prompt would be the same")


def _refused(name: str, value: object, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
