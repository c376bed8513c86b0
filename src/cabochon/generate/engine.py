"""The engine: many requests over one model, each answered as if it were alone.

A step is one forward pass: the newest token of every running request (and what speculation guesses behind it),
together with pieces of prompts that are still being read. Prompts are read in pieces so that a long one does not hold
up the others; what a prompt shares with an earlier one is not read again; a request that ends or is cancelled gives
its memory back at once. When memory runs out, the youngest request gives its pages up and waits; nothing fails.

The engine speaks token ids. Text, stop strings and time belong to the caller.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.machine import free_memory
from cabochon.generate.prefix import PrefixMemory
from cabochon.generate.request import Matcher, Request, Sampled
from cabochon.generate.sampling import SamplingParams, adjust, describe, generator
from cabochon.generate.speculate import Draft, Speculator, accept
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import OutOfPages, PagedBatch, PagePool, Segment, page_bytes, pages_for


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at a time."""

    cache_bytes: int | None = None  # memory for keys and values; None: up to half of what is free
    max_requests: int = 64  # side by side; the others wait
    chunk: int = 512  # tokens of prompts read in a step when nobody is waiting for the next token
    busy_chunk: int = 64  # the same while others are being answered: how long they may be held up


class Engine:
    """Answers requests. One thread at a time may call it.

    Args:
        stop_ids: tokens that end an answer ("stop"); they are reported, the caller leaves them out of the text.
        speculator: guesses tokens ahead; answers stay what they are without it.
    """

    def __init__(
        self,
        model: Gemma2,
        stop_ids: frozenset[int],
        config: EngineConfig = EngineConfig(),
        speculator: Speculator | None = None,
    ) -> None:
        self.model, self.stop_ids, self.config, self.speculator = model, stop_ids, config, speculator
        each = page_bytes(model.config, model.cache_dtype)
        most = config.max_requests * pages_for(model.config, model.config.max_position)
        budget = free_memory(str(model.device)) // 2 if config.cache_bytes is None else config.cache_bytes
        pages = min(most, budget // each)
        if pages < pages_for(model.config, 1):
            raise UsageError(
                f"a cache of {budget} bytes is too small",
                f"one page of keys and values takes {each} bytes and a request needs two",
                f"give it at least {2 * each} bytes",
            )
        self.pool = PagePool(model.config, pages, model.cache_dtype, model.device)
        self.prefixes = PrefixMemory(self.pool)
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # oldest first

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, choice: int = 0, matcher: Matcher | None = None
    ) -> Request:
        """Queue a prompt (not empty, shorter than the context). `choice` tells the n answers to one prompt apart.

        Raises `MissingResource` when the whole cache could not hold prompt and answer.
        """
        room = self.model.config.max_position - len(prompt)
        limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        if pages_for(self.model.config, len(prompt) + limit) > self.pool.pages:
            raise MissingResource(
                "the cache is too small for this request",
                f"{len(prompt)} tokens of prompt and {limit} of answer need "
                f"{pages_for(self.model.config, len(prompt) + limit)} pages; there are {self.pool.pages}",
                "lower max_new_tokens, shorten the prompt, or give the engine more memory (cache_bytes)",
            )
        request = Request(list(prompt), params, limit, generator(params.seed, choice), matcher)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its memory is free when this returns. Without effect on one that has ended."""
        if not request.done:
            self._end(request)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.active

    def weights_changed(self) -> None:
        """Forget all keys and values: they belong to the weights that were. Running requests are read again."""
        for request in list(self.active):
            self._postpone(request)
        self.prefixes.clear()

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """One forward pass and the tokens that came out of it, noted with their requests as well."""
        self._admit()
        planned = self._plan()
        if not planned:
            return []
        logits = self._forward(planned)
        sampled: list[Sampled] = []
        for (request, tokens, draft), rows in zip(planned, logits, strict=True):
            assert request.sequence is not None
            end = request.sequence.length + len(tokens)
            if rows is None:  # the prompt goes on
                request.sequence.advance(end)
            else:
                sampled += self._take(request, rows, draft)
            self._remember(request)
            if request.done:
                self._end(request)
        return sampled

    def _admit(self) -> None:
        """Let waiting requests in, first come first served, while there is room for their prompts."""
        while self.waiting and len(self.active) < self.config.max_requests:
            request = self.waiting[0]
            try:
                request.sequence = self.prefixes.recall(request.tokens)
            except OutOfPages:
                return
            needed = pages_for(self.model.config, request.length + 1)
            needed -= sum(map(len, request.sequence.blocks.values()))
            self.prefixes.forget(needed)
            if self.pool.free < needed and self.active:
                request.sequence.close()
                request.sequence = None
                return
            request.reused = request.sequence.length
            self.active.append(self.waiting.popleft())

    def _plan(self) -> list[tuple[Request, list[int], Draft]]:
        """What each request has computed in this step, few tokens before many; pages for all of it are reserved."""
        answering = [r for r in self.active if r.missing == 1]
        planned = [(r, r.tokens[-1:], self._draft(r)) for r in answering]
        room = self.config.busy_chunk if answering else self.config.chunk
        for request in [r for r in self.active if r.missing > 1]:
            assert request.sequence is not None
            tokens = request.tokens[request.sequence.length :][: max(0, room)]
            room -= len(tokens)
            if tokens:
                planned.append((request, tokens, Draft()))
        planned = [(r, [*tokens, *draft.tokens], draft) for r, tokens, draft in planned]
        reserved = [p for p in planned if self._reserve(p[0], len(p[1]))]
        kept = [p for p in reserved if p[0].sequence is not None]  # a later one may have cost an earlier one its pages
        return sorted(kept, key=lambda p: len(p[1]))

    def _draft(self, request: Request) -> Draft:
        left = request.limit - len(request.generated) - 1  # one comes without guessing
        if self.speculator is None or request.matcher or left < 1:
            return Draft()
        return self.speculator.propose(request, left)

    def _reserve(self, request: Request, count: int) -> bool:
        """Pages for the next tokens of a request, at the cost of old prompts and then of the youngest requests."""
        while request.sequence is not None:
            try:
                request.sequence.reserve(request.sequence.length + count)
                return True
            except OutOfPages:
                self.prefixes.forget(1)
                if not self.pool.free:
                    self._postpone(self.active[-1])
        return False

    def _postpone(self, request: Request) -> None:
        """Take a request's pages away; it goes on later as if its answer so far were part of its prompt."""
        self.active.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _forward(self, planned: list[tuple[Request, list[int], Draft]]) -> list[Tensor | None]:
        """Logits float32 [rows, V] behind the tokens that need them: none while a prompt is being read."""
        planned_ = [(r.sequence, tokens) for r, tokens, _ in planned if r.sequence is not None]
        segments = [Segment(sequence, sequence.length, len(tokens)) for sequence, tokens in planned_]
        batch = PagedBatch(self.pool, segments)
        ids = torch.tensor([[token for _, tokens in planned_ for token in tokens]], device=self.model.device)
        hidden = self.model.hidden(ids, batch.positions, cache=batch)[0]
        wanted: list[list[int]] = []
        place = 0
        for request, tokens, draft in planned:
            place += len(tokens)
            reads_on = len(tokens) - len(draft.tokens) < request.missing
            wanted.append([] if reads_on else list(range(place - len(draft.tokens) - 1, place)))
        rows = [row for group in wanted for row in group]
        logits = self.model.head(hidden[rows]) if rows else hidden
        parts = iter(logits.split([len(group) for group in wanted if group])) if rows else iter(())
        return [next(parts) if group else None for group in wanted]

    def _take(self, request: Request, logits: Tensor, draft: Draft) -> list[Sampled]:
        """The tokens that a request gains from its logits: one, and those of the draft that stand."""
        assert request.sequence is not None
        start, sampled = request.length, []
        for i, row in enumerate(logits):
            token, stands = self._sample(request, row, draft, i)
            request.generated.append(token)
            logprob = None if request.params.logprobs is None else describe(row, token, request.params.logprobs)
            last = "length" if len(request.generated) >= request.limit else None
            last = "stop" if token in self.stop_ids else last
            sampled.append(Sampled(request, token, logprob, last))
            request.done = last is not None
            if request.done or not stands:
                break
        request.sequence.advance(start + len(sampled) - 1)
        request.events.extend(sampled)
        return sampled

    def _sample(self, request: Request, logits: Tensor, draft: Draft, place: int) -> tuple[int, bool]:
        """The next token, and whether it is the draft's, so that the logits behind the draft's may be used too."""
        if request.matcher is not None:
            logits = logits.masked_fill(~request.matcher.mask().to(logits.device), -torch.inf)
        adjusted = adjust(logits, request.params, request.prompt, request.generated)
        token, stands = accept(adjusted, request.params, draft, place, request.draw)
        if request.matcher is not None:
            request.matcher.accept(token)
        return token, stands

    def _remember(self, request: Request) -> None:
        """Keep full pages for later prompts, and all of an answer that has ended."""
        if request.sequence is not None:
            self.prefixes.remember(request.tokens, request.sequence, whole=request.done)

    def _end(self, request: Request) -> None:
        request.done = True
        if request in self.active:
            self.active.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        if request.sequence is not None:
            request.sequence.close()
            request.sequence = None
        if self.speculator:
            self.speculator.release(request)
