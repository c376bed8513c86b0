"""What rewards can be told. Standard library only."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cabochon.base.errors import UsageError

DAY = 86400  # seconds; timers of the system cannot count to any number


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What answers are worth. Raises `UsageError` for values that make no sense.

    Args:
        reward: exact[:KEY], json[:SCHEMA], length:CHARACTERS, format:REGEX, FILE.py:FUNCTION, model:FOLDER, judge:URL.
            Can be repeated: their sum counts.
        reward_weights: What each of them is multiplied by; none: 1.
        reward_seconds: That one answer may take before it is left out; a judge has at least 60.
        max_failed_rewards: Answers without a reward, because it is no number, fails or hangs, before the run stops.
        judge_model: The name under which the judge's server knows its model.
        judge_prompt: A file with what the judge is asked; {prompt}, {completion} and keys of the row are filled in.
        judge_cache: A file that keeps the judge's verdicts, for this run and later ones; none: judge.jsonl in --out.
        judge_scale: The verdict that is worth 1; 0 is worth 0.
    """

    reward: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()
    reward_seconds: float = 10.0
    max_failed_rewards: int = 100
    judge_model: str = "default"
    judge_prompt: Path | None = None
    judge_cache: Path | None = None
    judge_scale: float = 10.0

    def __post_init__(self) -> None:
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UsageError(
                f"reward_weights cannot be {self.reward_weights}",
                f"there are {len(self.reward)} rewards",
                "give one weight for each --reward, in the same order",
            )
        if len(set(self.reward)) < len(self.reward):
            raise UsageError("one reward is named twice", ", ".join(self.reward), "name it once, with a larger weight")
        if not all(map(math.isfinite, self.reward_weights)):
            raise UsageError(f"reward_weights cannot be {self.reward_weights}", "one is no number", "give numbers")
        if not 0 < self.reward_seconds <= DAY:
            raise _refused("reward_seconds", self.reward_seconds, f"it has to be above 0, and at most {DAY}")
        if self.max_failed_rewards < 0:
            raise _refused("max_failed_rewards", self.max_failed_rewards, "it has to be at least 0")
        if not 0 < self.judge_scale < math.inf:
            raise _refused("judge_scale", self.judge_scale, "it has to be above 0")

    def settled(self) -> dict[str, Any]:
        """What a run that goes on has to have the same."""
        free = {"reward_seconds", "max_failed_rewards", "judge_cache"}
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in free}
        return named | {"judge_prompt": self.judge_prompt and str(self.judge_prompt)}


def _refused(name: str, value: object, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
