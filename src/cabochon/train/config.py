"""What a training run can be told. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One phase of training: how much, how fast, how careful."""

    steps: int
    rows: int = 16  # documents are packed into this many rows of `length` tokens for each step
    length: int = 256
    learning_rate: float = 3e-3  # of AdamW, for the embedding and the norms
    matrix_learning_rate: float = 2e-2  # of Muon, for the matrices inside the layers
    warmup_steps: int = 50
    decay_share: float = 0.6  # the last share of the steps, over which the rate falls linearly to `final_share`
    final_share: float = 0.02
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    log_every: int = 20
