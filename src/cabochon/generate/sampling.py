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
from cabochon.model.kernels.draw import draw as draw_by_kernel
from cabochon.model.kernels.losses import log_normaliser

_BLOCK = 1024  # probabilities that are added up before they join a running sum


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

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before count for less, or some tokens for more or less."""
        seen = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(seen or self.logit_bias)

    @property
    def cut(self) -> bool:
        """Whether unlikely tokens are never drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    @property
    def likeliest(self) -> bool:
        """Whether the next token is always the one with the largest logit."""
        return self.temperature == 0 and not self.penalised


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
    return drawn(logits, params, draw)


def adjust(logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Logits [V] after penalties and biases."""
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        seen = (torch.as_tensor(ids, dtype=torch.long, device=logits.device) for ids in (prompt, generated))
        logits = penalize(logits, params, *seen)
    return bias(logits, params.logit_bias)


def shares(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities float32 [V] at a temperature above 0, cut by top-k, top-p and min-p; their sum is not 1."""
    if params.temperature != 1:
        logits = (logits - logits.max()) / max(params.temperature, 1e-6)  # at most 0: a tiny one overflows nothing
    return keep(torch.softmax(logits, dim=-1), params)


def drawn(logits: Tensor, params: SamplingParams, draw: torch.Generator) -> int:
    """Draw from adjusted logits float32 [V] at a temperature above 0."""
    share = _share(draw)
    token = None if params.cut else draw_by_kernel(logits, 1 / max(params.temperature, 1e-6), share)
    return _at(shares(logits, params), share) if token is None else token


def pick(probabilities: Tensor, draw: torch.Generator) -> int:
    """Draw from probabilities [V] of any sum."""
    return _at(probabilities, _share(draw))


def _share(draw: torch.Generator) -> float:
    return float(torch.rand((), generator=draw, dtype=torch.float64))


def _at(probabilities: Tensor, share: float) -> int:
    """The token at a share of the sum of probabilities [V]. One seed, one answer, any device."""
    if probabilities.device.type != "cpu":
        sums = probabilities.double().cumsum(0)
        return _place(sums, sums[-1:] * share)
    # Running sums of all of a large vocabulary would take longer than its softmax: first those of blocks.
    whole = len(probabilities) // _BLOCK * _BLOCK
    parts = probabilities[:whole].view(-1, _BLOCK), probabilities[whole:].view(1, -1)
    sums = torch.cat([part.sum(1, dtype=torch.float64) for part in parts]).cumsum(0)
    wanted = sums[-1:] * share
    block = _place(sums, wanted)
    within = probabilities[block * _BLOCK : (block + 1) * _BLOCK].double().cumsum(0)
    return block * _BLOCK + _place(within, wanted - sums[block - 1] if block else wanted)


def _place(sums: Tensor, wanted: Tensor) -> int:
    """The first place whose running sum [N] is above a number [1], or the last one that adds to the sum."""
    total = sums[-1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    return int(torch.searchsorted(sums, torch.minimum(wanted, below), right=True))


def penalize(logits: Tensor, params: SamplingParams, prompt: Tensor, generated: Tensor) -> Tensor:
    """Lower the logits of tokens seen before: repetition counts the prompt, the other two only the answer."""
    if params.repetition_penalty != 1:
        seen = torch.cat([prompt, generated]).unique()
        theirs = logits[seen]
        ends = torch.finfo(logits.dtype)
        penalty = max(params.repetition_penalty, ends.tiny)  # 0 times a forbidden token's -inf would be no number
        changed = torch.where(theirs > 0, theirs / penalty, theirs * penalty)
        # Two infinite logits would leave no probability to draw from.
        logits = logits.index_copy(0, seen, changed.clamp(max=ends.max))
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
        if params.min_p == 0:
            return probabilities
        return probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
    kept, order = _likeliest(probabilities, params)
    if params.top_p < 1:
        before = kept.cumsum(0) - kept  # mass of the likelier ones: a token stays while this is short of p
        share = params.top_p * (kept.sum() if params.top_k else probabilities.sum())
        kept[1:][before[1:] >= share] = 0  # the likeliest stays, even where p is too small for float32
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
    if alternatives == 0:
        rows = logits[None]
        normaliser = log_normaliser(rows, None, 1.0)
        return TokenLogprob(token, float(logits[token] - (rows.logsumexp(1) if normaliser is None else normaliser)))
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
