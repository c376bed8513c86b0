"""Answers to numbers: several rewards with their weights, and what becomes of those that fail.

    Function   a function of the user's or a built-in one, in a process of its own (rewards.py, reward_process.py)
    Model      a reward model (reward_model.py)
    Judge      another model behind an OpenAI-compatible endpoint (judge.py)

An answer for which any reward gives no number is left out. The caller counts them and asks `check_failures`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cabochon.base.errors import BadInput


@dataclass(frozen=True)
class Sample:
    """A prompt, what a model said to it, and the row that the prompt comes from."""

    prompt: str
    completion: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """Why an answer has no score."""

    reason: str


Score = float | Failure


class Scorer(Protocol):
    """One reward, for many answers at a time."""

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each, in order."""
        ...

    def close(self) -> None:
        """Let go of processes and files."""
        ...


@dataclass(frozen=True)
class Scored:
    """The weighted sum for an answer, or None and why; single rewards by name, before weights, as far as they are."""

    total: float | None
    parts: Mapping[str, float]
    reason: str = ""


class Rewards:
    """Scorers by name, with weights."""

    def __init__(self, scorers: Mapping[str, Scorer], weights: Sequence[float] = ()) -> None:
        self.scorers = dict(scorers)
        self.weights = tuple(weights) or (1.0,) * len(self.scorers)

    def __call__(self, samples: Sequence[Sample]) -> list[Scored]:
        """What each answer is worth."""
        columns = [scorer(samples) if samples else [] for scorer in self.scorers.values()]
        return [self._sum(scores) for scores in zip(*columns, strict=True)]

    def close(self) -> None:
        """Close all scorers."""
        for scorer in self.scorers.values():
            scorer.close()

    def _sum(self, scores: Sequence[Score]) -> Scored:
        parts = {name: float(s) for name, s in zip(self.scorers, scores, strict=True) if not isinstance(s, Failure)}
        for name, score in zip(self.scorers, scores, strict=True):
            if isinstance(score, Failure):
                return Scored(None, parts, f"{name}: {score.reason}")
            if not math.isfinite(score):
                return Scored(None, parts, f"{name}: it gave {score}")
        return Scored(sum(w * score for w, score in zip(self.weights, parts.values(), strict=True)), parts)


def check_failures(failed: int, limit: int, reason: str) -> None:
    """Raise `BadInput` when more answers than the limit have no reward; `reason` is that of the last one."""
    if failed > limit:
        raise BadInput(
            f"{failed} answers got no reward, and {limit} may",
            f"the last one: {reason}",
            "mend the reward, or let more fail: --max-failed-rewards; the same command goes on from the checkpoint",
        )
