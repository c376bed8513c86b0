"""The reference generation loop: token ids in, one more token for every live row at each step.

It speaks ids only; text, stop strings and time belong to the caller. Rows of unequal length lie side by side,
padded on the left with position -1, and a finished row leaves the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cabochon.generate.sampling import SamplingParams, TokenLogprob, describe, generator, sample
from cabochon.model.cache import KVCache
from cabochon.model.gemma2 import Gemma2
from cabochon.model.visibility import NOTHING


@dataclass(frozen=True)
class Sampled:
    """One new token of one row; `last` says why the row ended with it, if it did: "stop" or "length"."""

    row: int
    token: int
    logprob: TokenLogprob | None
    last: str | None


@dataclass
class _Row:
    number: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    draw: torch.Generator
    generated: list[int] = field(default_factory=list)


class PlainLoop:
    """Answers to several prompts at once. Every prompt yields `params.n` neighbouring rows.

    Args:
        prompts: token ids of each prompt, none empty, each shorter than the context.
        params: one for each prompt.
        stop_ids: tokens that end a row ("stop"); they are reported, the caller leaves them out of the text.
    """

    def __init__(
        self,
        model: Gemma2,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        stop_ids: frozenset[int],
    ) -> None:
        self.model, self.stop_ids = model, stop_ids
        self._rows: list[_Row] = []
        for prompt, wanted in zip(prompts, params, strict=True):
            room = model.config.max_position - len(prompt)
            limit = room if wanted.max_new_tokens is None else min(wanted.max_new_tokens, room)
            for choice in range(wanted.n):
                row = _Row(len(self._rows), list(prompt), wanted, limit, generator(wanted.seed, choice))
                self._rows.append(row)
        self._cache: KVCache | None = None
        self._logits = torch.empty(0)

    @property
    def live(self) -> list[int]:
        """Numbers of the rows that go on."""
        return [row.number for row in self._rows]

    def stop(self, numbers: Sequence[int]) -> None:
        """Take rows out of the batch."""
        kept = [i for i, row in enumerate(self._rows) if row.number not in numbers]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if self._cache is not None and kept:
            self._cache.select(kept)

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """One more token for each live row. Rows that ended leave the batch."""
        logits = self._next_logits()
        sampled = [self._sample(row, logits[i]) for i, row in enumerate(self._rows)]
        self.stop([s.row for s in sampled if s.last])
        return sampled

    def _sample(self, row: _Row, logits: Tensor) -> Sampled:
        token = sample(logits, row.params, row.prompt, row.generated, row.draw)
        row.generated.append(token)
        wanted = row.params.logprobs
        logprob = None if wanted is None else describe(logits, token, wanted)
        length = "length" if len(row.generated) >= row.limit else None
        return Sampled(row.number, token, logprob, "stop" if token in self.stop_ids else length)

    def _next_logits(self) -> Tensor:
        """float32 [rows, V] after the newest token of each row, or after the prompts."""
        device = self.model.device
        if self._cache is None:
            ids, positions = _pad_left([row.prompt for row in self._rows])
            longest = ids.shape[1]
            self._cache = KVCache(
                self.model.config,
                len(self._rows),
                longest + max(row.limit for row in self._rows),
                dtype=self.model.cache_dtype,
                device=device,
            )
        else:
            ids = torch.tensor([[row.generated[-1]] for row in self._rows])
            positions = torch.tensor([[len(row.prompt) + len(row.generated) - 1] for row in self._rows])
        hidden = self.model.hidden(ids.to(device), positions.to(device), cache=self._cache)
        return self.model.head(hidden[:, -1])


def _pad_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids and positions int64 [rows, longest]; padding has position -1, so that nothing sees it."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + p for p in prompts]
    positions = [[NOTHING] * (longest - len(p)) + list(range(len(p))) for p in prompts]
    return torch.tensor(ids), torch.tensor(positions)
