"""What a training run can be told. Standard library only."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from cabochon.base.errors import UsageError

Optimizers = Literal["muon", "adamw"]
Schedules = Literal["wsd", "cosine", "linear", "constant"]
Precision = Literal["bf16", "float32"]

# Fields whose value changes how a run gets to its result, and not the result.
_FREE = {
    "micro_rows",
    "recompute",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "tensor_parallel",
    "sharded_checkpoints",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One phase of training: how much, how fast, how careful. Raises `UsageError` for values that make no sense.

    Args:
        steps: How many times the weights change.
        rows: Rows of a step, over all devices. Documents are packed into them.
        length: Tokens of a row.
        micro_rows: Rows that go through the model at once; 0: all. The result does not depend on it.
        optimizer: muon is for the matrices inside the layers; embedding and norms get AdamW in any case.
        learning_rate: Peak of AdamW.
        matrix_learning_rate: Peak of Muon.
        weight_decay: Of matrices.
        beta1: Of AdamW: how long the mean of gradients lasts.
        beta2: Of AdamW: how long the mean of their squares lasts.
        max_grad_norm: Longer gradients are shortened to this.
        schedule: wsd: flat, then down in a line; cosine or linear: down from the start; constant.
        warmup_steps: Steps over which the rate rises from 0.
        decay_share: Of wsd: the last share of the steps, over which the rate falls.
        final_share: Share of the peak rate at the last step.
        precision: Of products. Weights, gradients and the optimizer are float32.
        recompute: Keep only each layer's input for the way back: less memory, a third more work.
        ema: Average the weights, the new ones counting 1 - EMA, and keep the average; 0: no average.
        label_smoothing: Share of the target's probability that is spread over the vocabulary.
        z_loss: Weight of the squared log normaliser, which keeps logits small.
        spike_factor: Leave out steps whose loss is this many deviations above the last ones; 0: none.
        spike_window: How many steps the last ones are.
        max_skipped: Steps in a row that may be left out; then the loss is believed, or the run stops if it is NaN.
        log_every: Steps between lines of the log.
        eval_every: Steps between evaluations; 0: one at the end.
        save_every: Steps between checkpoints; 0: one at the end, and when the run is stopped.
        keep: Checkpoints that are kept.
        tensor_parallel: With torchrun: how many neighbouring devices share the matrices of each layer.
        sharded_checkpoints: With torchrun: every device writes its own part, while training goes on.
        seed: Of whatever is drawn at random.
    """

    steps: int
    rows: int = 16
    length: int = 256
    micro_rows: int = 0
    optimizer: Optimizers = "muon"
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 2e-2
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    schedule: Schedules = "wsd"
    warmup_steps: int = 50
    decay_share: float = 0.6
    final_share: float = 0.02
    precision: Precision = "bf16"
    recompute: bool = False
    ema: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    spike_factor: float = 6.0
    spike_window: int = 64
    max_skipped: int = 5
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    tensor_parallel: int = 1
    sharded_checkpoints: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _least().items():
            value = getattr(self, name)
            if not value >= least:  # NaN is refused as well
                raise _refused(name, value, f"it has to be at least {least}")
            if value == math.inf and name != "max_grad_norm":  # which then shortens nothing
                raise _refused(name, value, "it has to be a number")
        for name in ("ema", "label_smoothing", "beta1", "beta2"):
            if not getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "it has to be below 1")
        for name in ("decay_share", "final_share"):
            if not getattr(self, name) <= 1:
                raise _refused(name, getattr(self, name), "a share is at most 1")
        if not self.max_grad_norm > 0:
            raise _refused("max_grad_norm", self.max_grad_norm, "gradients would vanish")

    def settled(self) -> dict[str, Any]:
        """The fields that decide what comes out; a run that goes on must have the same."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _FREE}


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Defaults for a model that knows something already: small steps with AdamW.

    Args:
        steps: How many times the weights change; 0: as often as --epochs of the data make it.
        learning_rate: Peak of AdamW; 0: 2e-5, and 2e-4 for adapters.
    """

    steps: int = 0
    rows: int = 8
    length: int = 1024
    optimizer: Optimizers = "adamw"
    learning_rate: float = 0.0
    schedule: Schedules = "cosine"
    beta2: float = 0.999
    warmup_steps: int = 20
    log_every: int = 10


def _least() -> dict[str, int]:
    ones = ("rows", "length", "spike_window", "log_every", "keep", "tensor_parallel")
    return {field.name: int(field.name in ones) for field in fields(TrainConfig) if field.type in (int, float)}


def _refused(name: str, value: float, why: str) -> UsageError:
    flag = name.replace("_", "-")
    return UsageError(f"{name} cannot be {value}", why, f"give another value (--{flag}), or leave it out")
