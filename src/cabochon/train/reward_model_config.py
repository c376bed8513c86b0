"""What the training of a reward model can be told. Standard library only."""

import math
from dataclasses import dataclass

from cabochon.base.errors import UsageError
from cabochon.train.config import TuneConfig


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(TuneConfig):
    """How a model learns which of two answers is better. Raises `UsageError` for values that make no sense.

    Args:
        centring: Weight of the square of both scores' sum, which keeps their mean at 0.
        learning_rate: Peak of AdamW.
    """

    centring: float = 0.01
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.centring < math.inf:
            raise UsageError(
                f"centring cannot be {self.centring}", "it has to be at least 0", "give another value (--centring)"
            )
        for name in ("label_smoothing", "z_loss"):
            if getattr(self, name):
                raise UsageError(
                    f"{name} cannot be {getattr(self, name)}",
                    "it is a term of cross-entropy, and a loss of pairs has none",
                    f"leave out --{name.replace('_', '-')}",
                )
