"""What guessing scores: at random, and always saying what is right most often."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cabochon.evaluate.mini.items import Item


@dataclass(frozen=True)
class Baseline:
    """Shares of right answers; of texts, bits per byte: of noise, and of the training texts' bytes without context."""

    random: float
    majority: float


def baseline(name: str, train: Sequence[Item], test: Sequence[Item]) -> Baseline:
    """Of a task, over its test items."""
    if name in ("code", "prose"):
        return Baseline(8.0, _bits_per_byte([i["text"] for i in train], [i["text"] for i in test]))
    if "gold" in test[0]:
        golds = Counter(item["gold"] for item in test)
        ways = [len(item.get("choices") or item["contexts"]) for item in test]
        return Baseline(sum(1 / n for n in ways) / len(ways), golds.most_common(1)[0][1] / len(test))
    # Answers that are written: of all that are ever right, any one, or the one that is right most often.
    answers = Counter(answer for item in test for answer in item.get("expected") or [item["result"]])
    return Baseline(answers.total() / len(answers) / len(test), answers.most_common(1)[0][1] / len(test))


def _bits_per_byte(train: Sequence[str], test: Sequence[str]) -> float:
    counts = Counter(byte for text in train for byte in text.encode())
    total = counts.total() + 256
    sizes = [len(text.encode()) for text in test]
    return sum(-math.log2((counts[b] + 1) / total) for text in test for b in text.encode()) / sum(sizes)
