"""A Gemma 2 that gives a number for a text instead of the next token: the body, and a linear head without a bias.

The number is read at one position, from the final hidden state there. Folders call it Gemma2ForSequenceClassification
with one label. Dimension letters: M positions, D hidden size.
"""

import torch
from torch import Tensor

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import Linear


class ScoredGemma2(Gemma2):
    """The model with `score`, a weight [1, D]. Its output head is not used, and its embedding reads alone."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        self.score = Linear(config.hidden_size, 1)

    @classmethod
    def over(cls, model: Gemma2) -> "ScoredGemma2":
        """The same body, its tensors shared, with a head of zeros: every text is worth 0."""
        with torch.device("meta"):
            scored = cls(model.config)
        score = torch.zeros(1, model.config.hidden_size, dtype=model.embedding.weight.dtype, device=model.device)
        scored.load_state_dict({**model.state_dict(), "score.weight": score}, assign=True)
        return scored.train(model.training)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores float32 (or float64 of float64 weights) [M] of final hidden states [M, D]."""
        wide = torch.promote_types(self.score.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # 16 bits would round small differences away
            return hidden.to(wide) @ self.score.weight[0].to(wide)
