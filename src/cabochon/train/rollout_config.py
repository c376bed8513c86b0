"""What rollouts can be told. Standard library only."""

from dataclasses import asdict, dataclass
from typing import Any

from cabochon.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How a model in training answers prompts. Raises `UsageError` for values that make no sense.

    Args:
        prompts_per_step: prompts that are answered in a step, over all devices.
        samples: answers to each prompt.
        max_new_tokens: tokens of an answer at most; it is cut there.
        sample_temperature: of the draws: 1 is what the model says, 0 its likeliest token always.
        side_by_side: answers that are written at the same time; memory for as many is set aside.
    """

    prompts_per_step: int = 8
    samples: int = 1
    max_new_tokens: int = 128
    sample_temperature: float = 1.0
    side_by_side: int = 64

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples", "max_new_tokens", "side_by_side"):
            if not getattr(self, name) >= 1:
                raise _refused(name, getattr(self, name), "it has to be at least 1")
        if not 0 <= self.sample_temperature < float("inf"):
            raise _refused("sample_temperature", self.sample_temperature, "it has to be at least 0")

    def settled(self) -> dict[str, Any]:
        """What a run that goes on has to have the same."""
        return {f"rollout_{name}": value for name, value in asdict(self).items()}


def _refused(name: str, value: object, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
