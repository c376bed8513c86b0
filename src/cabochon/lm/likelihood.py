"""How likely a model finds texts and answers: bits per byte, perplexity, and answers that it would give itself.

A text is read in stretches that know nothing of each other. Each begins with BOS, without which Gemma 2 has never seen
anything, so that every token of the text is predicted exactly once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from cabochon.base.errors import BadInput
from cabochon.data.pack import Example
from cabochon.lm.model import LM
from cabochon.model.head import logit_chunks
from cabochon.text.tokenizer import Tokenizer

STRETCH = 2048  # tokens of a stretch, and of a batch of shorter examples


@dataclass(frozen=True)
class Likelihood:
    """Sums over examples.

    Attributes:
        nats: negative log-probability of all learned tokens.
        tokens: how many those are.
        nbytes: of their text in UTF-8, as told by the caller.
        examples: how many there are.
        greedy: examples whose learned tokens are all the likeliest ones: those that the model would answer so itself.
    """

    nats: float
    tokens: int
    nbytes: int
    examples: int
    greedy: int

    @property
    def bits_per_byte(self) -> float:
        """What the text could be compressed to. It does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.nbytes

    @property
    def nats_per_token(self) -> float:
        """The loss of training."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token; infinite where it would leave float64."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


@torch.inference_mode()
def likelihood(lm: LM, examples: Sequence[Example], nbytes: int) -> Likelihood:
    """Measure examples, several short ones side by side. Raises `BadInput`: one is too long, or nothing is learned."""
    longest = max((len(example.ids) for example in examples), default=0)
    if longest > lm.context_length or not any(any(example.learned) for example in examples):
        cause = f"an example has {longest} tokens, the context {lm.context_length}" if longest else "there is no text"
        raise BadInput("nothing can be measured", cause, "give texts that fit the context")
    nats, tokens, greedy = 0.0, 0, 0
    for batch in _batches(examples):
        length = max(len(example.ids) for example in batch)
        # What fills a row stands behind everything that is measured, where no token can see it.
        ids = torch.tensor([e.ids + [0] * (length - len(e.ids)) for e in batch], device=lm.model.device)
        wanted = torch.tensor([e.learned + [False] * (length - len(e.ids)) for e in batch], device=ids.device)[:, 1:]
        hidden, targets = lm.model.hidden(ids[:, :-1])[wanted], ids[:, 1:][wanted]
        wrong, done = torch.zeros(len(batch), device=ids.device), 0
        rows = wanted.nonzero()[:, 0]
        for logits in logit_chunks(lm.model.head, hidden, lm.config.vocab_size):
            here = slice(done, done + len(logits))
            nats += cross_entropy(logits, targets[here], reduction="none").double().sum().item()
            wrong.index_add_(0, rows[here], (logits.argmax(-1) != targets[here]).float())
            done += len(logits)
        tokens += done
        greedy += int((wrong == 0).sum())
    return Likelihood(nats, tokens, nbytes, len(examples), greedy)


def stretches(tokenizer: Tokenizer, text: str, length: int = STRETCH) -> list[Example]:
    """A text in stretches of so many tokens, all of which are learned but BOS."""
    ids = tokenizer.encode(text, bos=False)
    parts = [ids[start : start + length - 1] for start in range(0, len(ids), length - 1)]
    return [Example([tokenizer.bos_id, *part], [False] + [True] * len(part)) for part in parts]


def answer_example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    """A prompt and the answer that is learned, divided as in `LM.score`; side by side where the answer would only
    change the prompt's last token. Raises `BadInput` for an empty answer.
    """
    if not answer:
        raise BadInput("nothing can be measured", "there is no answer", "give some text")
    before, ids = tokenizer.encode(prompt.rstrip()), tokenizer.encode(prompt + answer)
    if len(before) >= len(ids):
        ids = before + tokenizer.encode(answer, bos=False)
    return Example(ids, [i >= len(before) for i in range(len(ids))])


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of about one length side by side, at most `STRETCH` tokens unless one is longer."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > STRETCH:
            yield batch
            batch = []
        batch.append(example)
    yield batch
