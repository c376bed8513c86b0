"""What distillation can be told. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from cabochon.base.errors import UsageError

DivergenceName = Literal["forward-kl", "reverse-kl", "jsd", "tv"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is held to its teacher. Raises `UsageError` for values that make no sense.

    Args:
        divergence: what is made small: forward-kl, as for Gemma 2, reverse-kl, jsd (Jensen-Shannon), tv (total
            variation).
        beta: of jsd, the teacher's share in the mixture that both are compared with.
        temperature: what the logits of both are divided by. A stored teacher has one of its own.
        ce_share: share of the loss that is cross-entropy with the text itself, at temperature 1.
    """

    divergence: DivergenceName = "forward-kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce_share: float = 0.0

    def __post_init__(self) -> None:
        names = DivergenceName.__args__  # type: ignore[attr-defined]
        if self.divergence not in names:
            raise _refused("divergence", self.divergence, f"it is one of {', '.join(names)}")
        if not 0 <= self.beta <= 1:
            raise _refused("beta", self.beta, "it has to be from 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise _refused("temperature", self.temperature, "it has to be above 0")
        if not 0 <= self.ce_share < 1:
            raise _refused("ce_share", self.ce_share, "it has to be from 0 up to, but not, 1")


def _refused(name: str, value: object, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
