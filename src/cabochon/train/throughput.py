"""How much of the machine's speed a run uses: operations of a token, over the rate of one large matrix product."""

import time

import torch

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.train.config import TrainConfig
from cabochon.train.optim import trainable

SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that the rate is measured with


def operations(config: Gemma2Config, length: int, *, frozen: bool = False) -> int:
    """Floating-point operations of a token, forward and backward, in rows of `length`: 2 + 4 for each weight.

    The embedding counts once, as the head; attention is counted over the keys that a causal mask leaves, half of the
    row or of the window. Recomputed activations are not counted: they are no use to anyone. With `frozen` weights
    nothing is multiplied for their gradients, and it is 2 + 2.
    """
    matrices = config.num_parameters - (4 * config.num_layers + 1) * config.hidden_size
    wide = config.num_heads * config.head_dim
    seen = sum(
        (min(length, config.sliding_window) if config.is_local(i) else length) / 2 for i in range(config.num_layers)
    )
    return int((4 if frozen else 6) * matrices + 12 * wide * seen)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of five products of large square matrices."""
    size, draw = (
        SIZE.get(device.type, 2048),
        torch.Generator(device).manual_seed(0),
    )  # a run's own draws go on as before
    a, b = (torch.randn(size, size, device=device, generator=draw).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for a GPU to finish
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class Throughput:
    """The share of peak of a run. The rate is measured once, at the first question."""

    def __init__(self, model: Gemma2, config: TrainConfig) -> None:
        frozen = len(trainable(model)) < len(list(model.parameters()))
        self.operations = operations(model.config, config.length, frozen=frozen)
        self.device, self.dtype = model.device, torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.rate: float | None = None

    def share(self, tokens_per_second: float) -> float:
        """From 0 to 1."""
        if self.rate is None:
            self.rate = matrix_rate(self.device, self.dtype)
        return tokens_per_second * self.operations / self.rate
