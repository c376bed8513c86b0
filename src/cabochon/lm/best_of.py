"""The best of several answers to a prompt, or the best and the worst, by a reward: what preferences are learned from.

The best of n to tune on: RAFT, arXiv 2304.06767. The best and the worst as a pair: West-of-N, arXiv 2401.12086.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cabochon.text.chat import Message

# Prompt, answer, row of the prompt.
Asked = tuple[str, str, Mapping[str, Any]]


@dataclass(frozen=True)
class BestOf:
    """What becomes of several answers.

    Args:
        n: answers to each prompt.
        score: their rewards, in order; None for one that has none. It is called with those to many prompts at once.
        pairs: keep the best and the worst, otherwise the best alone.
        named: what the rewards are, for telling one command from another.
    """

    n: int
    score: Callable[[Sequence[Asked]], Sequence[float | None]]
    pairs: bool = False
    named: str = ""

    def row(self, messages: Sequence[Message], answers: Sequence[tuple[str, float | None]]) -> dict[str, Any] | str:
        """What is written of a prompt's answers and rewards, or the word for why nothing is.

        Of equal rewards the answer that was drawn first counts. A pair's rewards have to differ.
        """
        scored = [(text, score) for text, score in answers if score is not None]
        if not scored:
            return "unscored"
        best, worst = max(scored, key=_score), min(scored, key=_score)
        if not self.pairs:
            return {"messages": [*messages, _turn(best[0])], "score": best[1]}
        if best[1] == worst[1]:
            return "undecided"
        return {
            "prompt": list(messages),
            "chosen": [_turn(best[0])],
            "rejected": [_turn(worst[0])],
            "score_chosen": best[1],
            "score_rejected": worst[1],
        }


def _score(answer: tuple[str, float]) -> float:
    return answer[1]


def _turn(text: str) -> Message:
    return {"role": "assistant", "content": text}
