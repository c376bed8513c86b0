"""The answers to one request on their way from the engine to whoever waits for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from cabochon.generate.sampling import SamplingParams, TokenLogprob


class Piece(NamedTuple):
    """What one token added to an answer. `row` counts prompts first, then the answers to each."""

    row: int
    text: str
    token: int
    logprob: TokenLogprob | None
    finish_reason: str | None


class Job:
    """`params.n` answers to each of some prompts. Iterating gives lists of pieces as they come, to one reader.

    Attributes:
        left: answers that have not ended.
        first, tokens: when each answer's first token came (0: not yet), and how many came.
        cached: tokens of prompts that were known already, per row.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        self.prompts, self.params = prompts, params
        self.rows = self.left = len(prompts) * params.n
        self.created = time.perf_counter()
        self.first, self.tokens, self.cached = [0.0] * self.rows, [0] * self.rows, [0] * self.rows
        self.cancelled = False
        self.timer: asyncio.TimerHandle | None = None
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[list[Piece]]:
        return self._run()

    async def _run(self) -> AsyncIterator[list[Piece]]:
        ended = 0
        while ended < self.rows:
            await self._ready.wait()
            self._ready.clear()
            pieces, self._pieces = self._pieces, []
            ended += sum(piece.finish_reason is not None for piece in pieces)
            if pieces:
                yield pieces
            if self._error:
                raise self._error

    def deliver(self, pieces: list[Piece]) -> None:
        """More of the answers."""
        self._pieces += pieces
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """What has not come yet will not come."""
        self._error = self._error or error
        self._ready.set()

    def ended(self, rows: int) -> None:
        """Some answers are over, one way or another."""
        self.left -= rows
        if not self.left and self.timer:
            self.timer.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))
