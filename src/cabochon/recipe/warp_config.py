"""What WARP can be told, beside what its policies are told. Standard library only."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from cabochon.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WarpConfig:
    """Training, merging, training on (arXiv 2406.16768). Raises `UsageError` for values that make no sense.

    Args:
        model: where it begins: a folder or a Hugging Face id; left out: the model that ships inside.
        steps: of each policy: one number, or one for each iteration.
        iterations: how often policies are trained and merged.
        policies: trained from the same start in each iteration.
        eta: share of the merged policies in the start of the next iteration; the rest is the start of this one.
        seed: of the first policy; every later one has the next.
        held_out: rows with `prompt` or `messages` on which the front is measured; none: it is not.
        held_out_samples: answers to each of them.
        etas: of the front: shares of the last merge beside the model where all began.
        choose: the share that makes the result; 0: that of the largest reward minus beta times KL on held-out prompts.
        baseline_points: at how many steps the plain run is measured.
        save_dtype: precision of the result's weights.
    """

    model: str | None = None
    steps: tuple[int, ...]
    iterations: int = 3
    policies: int = 2
    eta: float = 0.3
    seed: int = 0
    held_out: tuple[str, ...] = ()
    held_out_samples: int = 4
    etas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    choose: float = 0.0
    baseline_points: int = 5
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("iterations", "policies", "held_out_samples", "baseline_points"):
            if getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "it has to be at least 1")
        if not self.steps or min(self.steps) < 1:
            raise _refused("steps", self.steps, "each has to be at least 1")
        if len(self.steps) not in (1, self.iterations):
            raise _refused("steps", self.steps, f"there are {self.iterations} iterations: give one number, or so many")
        for name in ("eta", "choose", "etas"):
            values = getattr(self, name)
            if not all(0 <= value <= 1 for value in (values if name == "etas" else (values,))):
                raise _refused(name, values, "a share is from 0 to 1")
        if not self.etas or len(set(self.etas)) < len(self.etas):
            raise _refused("etas", self.etas, "there have to be some, each once")
        if not self.held_out and not self.choose:
            raise UsageError(
                "nothing decides what the result is",
                "there are no held-out prompts on which shares could be compared",
                'give some: held_out = ["prompts.jsonl"], or a share: choose = 0.5',
            )

    def steps_of(self, iteration: int) -> int:
        """Of each policy in an iteration, counted from 0."""
        return self.steps[iteration if len(self.steps) > 1 else 0]

    @property
    def total_steps(self) -> int:
        """Of all policies together."""
        return self.policies * sum(self.steps_of(iteration) for iteration in range(self.iterations))

    def settled(self) -> dict[str, Any]:
        """What decides the trained and merged folders: the same for whoever goes on in them."""
        names = ("model", "steps", "iterations", "policies", "eta", "seed")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}


def _refused(name: str, value: object, why: str) -> UsageError:
    return UsageError(f"{name} cannot be {value}", why, "give another value, or leave it out")
