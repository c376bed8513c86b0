"""Logits in, a token out: pure functions on the logits of one position, and the settings that steer them.

The order is the usual one: penalties, bias, temperature, top-k, top-p, min-p, draw. V is the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.generate.grammar import Constraint


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered. Raises `UsageError` for a value outside its range."""

    max_new_tokens: int | None = None  # None: until the model stops or the context is full
    temperature: float = 0.0  # 0 is greedy: the most likely token, always
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probabilities reach p (arXiv 1904.09751)
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divide positive, multiply negative logits of seen tokens (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtract from the logits of generated tokens, once
    frequency_penalty: float = 0.0  # subtract from the logits of generated tokens, for each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()  # text that ends the answer and is not part of it
    seed: int | None = None  # None: another answer every time
    n: int = 1  # answers to the same prompt
    logprobs: int | None = None  # alternatives to report for each token; 0 reports only the token's own
    constraint: Constraint | None = None  # what the answer has to look like

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0, where 0 keeps all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < math.inf,
                "above 0, where 1 changes nothing",
            ),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "logit_bias": (not any(map(math.isnan, self.logit_bias.values())), "numbers"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a list of texts that are not empty"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "a whole number of at least 0"),
            "n": (1 <= self.n <= 128, "between 1 and 128"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UsageError(f"{name} cannot be {getattr(self, name)!r}", f"it has to be {rule}", f"change {name}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, before penalties and temperature, and the likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], draw: torch.Generator
) -> int:
    """Choose the next token from float32 logits [V], given the ids so far."""
    logits = adjust(logits, params, prompt, generated)
    if params.temperature == 0:
        return int(logits.argmax())
    return pick(shares(logits, params), draw)


def adjust(logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Logits [V] after penalties and biases."""
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        seen = (torch.as_tensor(ids, dtype=torch.long, device=logits.device) for ids in (prompt, generated))
        logits = penalize(logits, params, *seen)
    return bias(logits, params.logit_bias)


def shares(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32 [V] at a temperature above 0, cut by top-k, top-p and min-p; their sum is not 1."""
    below = logits - logits.max()  # the largest becomes 0, so that a tiny temperature overflows nothing
    return keep(torch.softmax(below / max(params.temperature, 1e-6), dim=-1), params)


def pick(probabilities: Tensor, draw: torch.Generator) -> int:
    """Draw from probabilities [V] of any sum; on the CPU: one seed, one answer, any device."""
    return int(torch.multinomial(probabilities.cpu(), 1, generator=draw))


def penalize(logits: Tensor, params: SamplingParams, prompt: Tensor, generated: Tensor) -> Tensor:
    """Lower the logits of tokens seen before: repetition counts the prompt, the other two only the answer."""
    if params.repetition_penalty != 1:
        seen = torch.cat([prompt, generated]).unique()
        theirs = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(theirs > 0, theirs / penalty, theirs * penalty))
    if (params.presence_penalty or params.frequency_penalty) and len(generated):
        seen, counts = generated.unique(return_counts=True)
        logits = logits.index_add(0, seen, -(params.presence_penalty + params.frequency_penalty * counts))
    return logits


def bias(logits: Tensor, biases: Mapping[int, float]) -> Tensor:
    """Add a number to the logits of some tokens; -inf forbids one."""
    if not biases:
        return logits
    ids = torch.tensor(list(biases), device=logits.device)
    return logits.index_add(0, ids, torch.tensor(list(biases.values()), dtype=logits.dtype, device=logits.device))


def keep(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zero the probabilities [V] that top-k, top-p and min-p cut off, each taking what the one before left.

    Not normalised again: every step compares shares of what is left, and drawing needs no sum of one.
    """
    if params.top_k == 0 and params.top_p == 1:
        return probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
    kept, order = _likeliest(probabilities, params)
    if params.top_p < 1:
        before = kept.cumsum(0) - kept  # mass of the likelier ones: a token stays while this is short of p
        kept[before >= params.top_p * (kept.sum() if params.top_k else probabilities.sum())] = 0
    if params.min_p > 0:
        kept[kept < params.min_p * kept[0]] = 0
    return torch.zeros_like(probabilities).scatter(0, order, kept)


def _likeliest(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Values and places of those that top-k and top-p can keep, largest first; sorting all 256,000 takes 20 ms."""
    size = len(probabilities)
    for few in (params.top_k or 1024, size):
        kept, order = probabilities.topk(min(few, size))
        if params.top_k or kept.sum() >= params.top_p * probabilities.sum():
            break
    return kept, order


def describe(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The log-probability of a token under float32 logits [V], with that many of the likeliest beside it."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), top)


def generator(seed: int | None, choice: int) -> torch.Generator:
    """A request's own source of randomness, so that its answer does not depend on who else is in the batch."""
    draw = torch.Generator()
    if seed is None:
        draw.seed()
    else:
        draw.manual_seed((seed * 1_000_003 + choice) % 2**63)
    return draw
