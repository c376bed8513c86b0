"""Guessing tokens ahead: several are checked in one forward pass, which costs little more than one token alone.

An answer stays what it would have been. Greedy: a guess stands if it is the likeliest token. Sampled: by exact
rejection sampling (arXiv 2211.17192, algorithm 1; arXiv 2302.01318), so that each token is distributed as without.

    PromptLookup  what followed the last few tokens where they stood before (in a summary, code, a chat's history)
    DraftModel    a smaller Gemma 2 over the same vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams, adjust, drawn, pick, shares
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import OutOfPages, PagedBatch, PagedSequence, PagePool, Segment, pages_for


@dataclass(frozen=True)
class Draft:
    """Guessed tokens and, for each, the distribution float32 [V] it was drawn from (sum 1); None: it was certain."""

    tokens: tuple[int, ...] = ()
    drawn_from: tuple[Tensor, ...] | None = None


class Speculator(Protocol):
    """Where guesses come from."""

    def propose(self, request: Request, most: int) -> Draft:
        """Up to `most` tokens that may come next."""

    def release(self, request: Request) -> None:
        """Forget what was kept for a request."""


def accept(logits: Tensor, params: SamplingParams, draft: Draft, place: int, draw: torch.Generator) -> tuple[int, bool]:
    """The next token from adjusted logits float32 [V], and whether it is the guess at `place` of the draft."""
    guess = draft.tokens[place] if place < len(draft.tokens) else None
    if params.temperature == 0:
        token = int(logits.argmax())
        return token, token == guess
    if guess is None:
        return drawn(logits, params, draw), False
    kept = shares(logits, params).cpu()
    wanted = kept / kept.sum()
    guessed = (
        draft.drawn_from[place].cpu()
        if draft.drawn_from
        else torch.zeros_like(wanted).index_fill(0, torch.tensor([guess]), 1.0)
    )
    if torch.rand((), generator=draw) * guessed[guess] < wanted[guess]:
        return guess, True
    return pick((wanted - guessed).clamp_min(0), draw), False


@dataclass
class PromptLookup:
    """Guesses that the text goes on as it did where its last `longest` to `shortest` tokens stood before."""

    ahead: int = 3  # guesses at a time: four rows cost a memory-bound step about as much as one
    longest: int = 4
    shortest: int = 2
    _seen: dict[Request, "_Index"] = field(default_factory=dict, repr=False)

    def propose(self, request: Request, most: int) -> Draft:
        """What followed the most recent earlier place, for the longest run of last tokens that has one."""
        tokens = request.tokens
        index = self._seen.setdefault(request, _Index())
        index.add(tokens, range(self.shortest, self.longest + 1))
        for size in range(self.longest, self.shortest - 1, -1):
            start = index.ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if start is not None:
                return Draft(tuple(tokens[start : start + min(self.ahead, most)]))
        return Draft()

    def release(self, request: Request) -> None:
        """Forget a request's index."""
        self._seen.pop(request, None)


@dataclass
class _Index:
    """Where each short run of tokens last ended, the end of the text itself not counted."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    done: int = 0

    def add(self, tokens: Sequence[int], sizes: range) -> None:
        for end in range(max(self.done, 1), len(tokens)):
            for size in sizes:
                if end >= size:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.done = len(tokens)


class DraftModel:
    """Guesses by a smaller model with the same vocabulary, which keeps a cache of its own.

    Raises `UsageError` when the vocabularies differ in size.
    """

    def __init__(self, draft: Gemma2, target: Gemma2, *, ahead: int = 4, max_requests: int = 64) -> None:
        if draft.config.vocab_size != target.config.vocab_size:
            raise UsageError(
                "this draft model cannot guess for that model",
                f"their vocabularies have {draft.config.vocab_size} and {target.config.vocab_size} tokens",
                "choose a smaller model with the same tokenizer",
            )
        self.model, self.ahead = draft, ahead
        pages = max_requests * pages_for(draft.config, draft.config.max_position)
        self.pool = PagePool(draft.config, pages, draft.cache_dtype, draft.device)
        self._held: dict[Request, tuple[PagedSequence, list[int]]] = {}  # what the cache holds, as tokens

    def propose(self, request: Request, most: int) -> Draft:
        """`ahead` tokens, drawn as the request draws its own."""
        room = self.model.config.max_position - request.length
        tokens, drawn_from = list(request.tokens), []
        try:
            for _ in range(min(self.ahead, most, room)):
                logits = adjust(self._logits(request, tokens), request.params, request.prompt, request.generated)
                if request.params.temperature == 0:
                    tokens.append(int(logits.argmax()))
                    continue
                kept = shares(logits, request.params).cpu()
                drawn_from.append(kept / kept.sum())
                tokens.append(pick(kept, request.draw))
        except OutOfPages:
            self.release(request)
        guessed = tuple(tokens[request.length :])
        return Draft(guessed, tuple(drawn_from) if drawn_from else None)

    def release(self, request: Request) -> None:
        """Free the pages kept for a request."""
        if request in self._held:
            self._held.pop(request)[0].close()

    def _logits(self, request: Request, tokens: list[int]) -> Tensor:
        """The draft's logits float32 [V] behind `tokens`; computes only what its cache does not hold."""
        sequence, known = self._held.setdefault(request, (PagedSequence(self.pool), []))
        same = next((i for i, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), len(known))
        same = min(same, len(tokens) - 1)
        del known[same:]
        sequence.advance(same)
        sequence.reserve(len(tokens))
        new = tokens[same:]
        batch = PagedBatch(self.pool, [Segment(sequence, same, len(new))])
        hidden = self.model.hidden(torch.tensor([new], device=self.model.device), batch.positions, cache=batch)
        sequence.advance(len(tokens))
        known += new
        return self.model.head(hidden[0, -1])
