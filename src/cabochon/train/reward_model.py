"""A reward model: of two answers to a prompt, it gives the better one the larger score.

    loss of a pair    -log sigmoid(r_chosen - r_rejected) + c (r_chosen + r_rejected)^2

The first term is the Bradley-Terry model of preferences (arXiv 2203.02155, equation 1), the second keeps scores, of
which only differences matter, around 0 (arXiv 2312.09244). A score is read at the last token of an answer before the
one that ends it: where the model would say the end, it has read everything.

Dimension letters: P pairs, M positions of a batch, D hidden size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cabochon.base.errors import CabochonError
from cabochon.data.pack import Batch
from cabochon.data.prompts import conversation
from cabochon.model.gemma2 import Gemma2
from cabochon.model.scored import ScoredGemma2
from cabochon.text.chat import encode_chat, encode_chat_with_mask
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.train.objectives import hidden_states
from cabochon.train.preference import pairs_of
from cabochon.train.reward_model_config import RewardModelConfig
from cabochon.train.scoring import Failure, Sample, Score
from cabochon.train.step import Measured, Objective
from cabochon.weights.folder import load_model

BINS = 10  # of confidences from 0.5 to 1, in which a model should be right as often as it is sure
_GAP = "gap_"


def reward_objective(config: RewardModelConfig) -> Objective:
    """The loss of a `ScoredGemma2` on batches of pairs. Its count is that of pairs, `pair_count`."""

    def loss(model: Gemma2, batch: Batch, count: float) -> Measured:
        chosen, rejected = _pair_scores(model, batch).unbind(1)
        losses = pair_losses(chosen, rejected, config.centring)
        apart = (chosen - rejected).detach()
        measures = {"accuracy": float((apart > 0).sum()) / count, "margin": float(apart.sum()) / count}
        return Measured(losses.sum() / count, measures)

    return loss


def pair_losses(chosen: Tensor, rejected: Tensor, centring: float) -> Tensor:
    """The loss of each pair [P] for scores [P]."""
    return -logsigmoid(chosen - rejected) + centring * (chosen + rejected).square()


def reward_measure(model: Gemma2, batch: Batch) -> tuple[int, Mapping[str, float]]:
    """For held-out pairs: the loss without centring, accuracy, margin, and for each bin of confidence by how much it
    exceeds accuracy, which `calibrated` adds up."""
    chosen, rejected = _pair_scores(model, batch).double().unbind(1)
    apart = chosen - rejected
    sure, right = apart.abs().sigmoid(), (apart > 0).double()
    bins = ((sure - 0.5) * 2 * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=bins.device).index_add_(0, bins, sure - right)
    return len(apart), {
        "loss": float(pair_losses(chosen, rejected, 0.0).sum()),
        "accuracy": float(right.sum()),
        "margin": float(apart.sum()),
        **{f"{_GAP}{number}": float(gap) for number, gap in enumerate(gaps)},
    }


def calibrated(means: Mapping[str, float]) -> dict[str, float]:
    """The means of `reward_measure` with the expected calibration error (arXiv 1706.04599, equation 3) for the gaps."""
    error = sum(abs(value) for name, value in means.items() if name.startswith(_GAP))
    return {name: value for name, value in means.items() if not name.startswith(_GAP)} | {"ece": error}


def _pair_scores(model: Gemma2, batch: Batch) -> Tensor:
    """Scores [P, 2] of the chosen and the rejected answers."""
    assert isinstance(model, ScoredGemma2)
    pairs = pairs_of(batch)
    places = pairs.counted.nonzero()[:, 0]
    # The last place of each answer: the positions of a batch, and so of an answer, are in order.
    last = torch.zeros(pairs.lengths.numel(), dtype=torch.long).scatter_reduce_(0, pairs.answers, places, "amax")
    hidden = hidden_states(model, batch)
    return model.scores(hidden[last.to(hidden.device)]).view(-1, 2)


class ModelScorer:
    """A reward model as a reward: scores of answers in Gemma's chat format.

    Args:
        folder: that `cabochon train reward` wrote, or another Gemma2ForSequenceClassification with one label.
        device: where it computes.

    Raises `BadInput` and `MissingResource` when the folder holds no such model.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        model = load_model(folder, device=device, kind=ScoredGemma2).requires_grad_(False).eval()
        assert isinstance(model, ScoredGemma2)
        self.model, self.tokenizer = model, load_tokenizer(folder)

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each answer, computed one by one so that it does not depend on the others."""
        return [self._score(sample) for sample in samples]

    def close(self) -> None:
        """Nothing is to be let go of."""

    @torch.inference_mode()
    def _score(self, sample: Sample) -> Score:
        try:
            ids = answer_ids(self.tokenizer, sample)
        except CabochonError as error:
            return Failure(f"{error.what}: {error.cause}")
        if len(ids) > self.model.config.max_position:
            return Failure(
                f"prompt and answer have {len(ids)} tokens, the model reads {self.model.config.max_position}"
            )
        hidden = self.model.hidden(torch.tensor([ids], device=self.model.device))
        return float(self.model.scores(hidden[0, -1:]))


def answer_ids(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """Tokens of a conversation up to the last one of the answer, as training sees them. Raises `BadInput`."""
    messages = conversation(sample.row, fold=True)
    if not sample.completion.strip():
        return encode_chat(tokenizer, messages)
    ids, learned = encode_chat_with_mask(tokenizer, [*messages, {"role": "model", "content": sample.completion}])
    return ids[: len(learned) - 1 - learned[::-1].index(True)]
