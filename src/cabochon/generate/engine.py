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
from itertools import accumulate, repeat

import torch
from torch import Tensor

from cabochon.base.errors import CabochonError, MissingResource, UsageError
from cabochon.base.machine import free_memory, keep_few_kernels, keep_freed_memory
from cabochon.generate.graphs import DecodeSteps
from cabochon.generate.prefix import PrefixMemory, agreement
from cabochon.generate.request import Matcher, Request, Sampled
from cabochon.generate.sampling import SamplingParams, adjust, describe, generator
from cabochon.generate.speculate import Draft, Speculator, accept
from cabochon.model.gemma2 import Gemma2
from cabochon.model.paged import PAGE, OutOfPages, PagedBatch, PagedSequence, PagePool, Segment, page_bytes, pages_for


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at a time."""

    cache_bytes: int | None = None  # memory for keys and values; None: up to half of what is free
    max_requests: int = 64  # side by side; the others wait
    chunk: int | None = None  # tokens of prompts read in a step while at most half of the requests are being answered
    busy_chunk: int | None = None  # the same while more of them are: how long they may be held up


CHUNKS = {"cpu": (512, 64), "cuda": (2048, 512)}  # where the configuration leaves them open


@dataclass(frozen=True)
class _Logits:
    """Logits float32 [rows, V] of one request, and the likeliest token of each row, if that is what it wants."""

    rows: Tensor
    likeliest: list[int]


@dataclass(frozen=True)
class _Work:
    """What one request has computed in a step: tokens of its own, and then those of the draft."""

    request: Request
    sequence: PagedSequence
    own: list[int]
    draft: Draft

    @property
    def count(self) -> int:
        return len(self.own) + len(self.draft.tokens)


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
        keep_freed_memory()
        keep_few_kernels()
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
        usual = CHUNKS["cuda" if model.device.type == "cuda" else "cpu"]
        self._chunk, self._busy_chunk = (
            given or default for given, default in zip((config.chunk, config.busy_chunk), usual, strict=True)
        )
        self.pool = PagePool(model.config, pages, model.cache_dtype, model.device)
        self.prefixes = PrefixMemory(self.pool)
        # On a CPU the kernels for any mixture of requests cost nothing more.
        self.decode = DecodeSteps(model, self.pool) if model.device.type == "cuda" else None
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
        """End a request now. Its memory goes to whoever asks next; until then later prompts can find what it held.

        Without effect on one that has ended.
        """
        if not request.done:
            self._end(request)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.active

    def weights_changed(self, *, in_place: bool = False) -> None:
        """Forget all keys and values: they belong to the weights that were. Running requests are read again.

        `in_place`: the new ones lie where the old ones did, so that what was captured for a GPU still holds.
        """
        for request in list(self.active):
            self._postpone(request)
        self.prefixes.clear()
        if self.decode and not in_place:
            self.decode.forget()

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """One forward pass and the tokens that came out of it, noted with their requests as well."""
        self._admit()
        works = self._plan()
        if not works:
            return []
        sampled: list[Sampled] = []
        for work, logits in zip(works, self._forward(works), strict=True):
            if logits is None:  # the prompt goes on
                work.sequence.advance(work.sequence.length + work.count)
            else:
                sampled += self._take(work, logits)
            if work.request.done:
                self._end(work.request)
            else:
                self._remember(work.request)
        return sampled

    def _admit(self) -> None:
        """Let waiting requests in, first come first served, while there is room for their prompts."""
        while self.waiting and len(self.active) < self.config.max_requests:
            request = self.waiting[0]
            request.sequence = self.prefixes.recall(request.tokens)
            needed = pages_for(self.model.config, request.length + 1)
            needed -= sum(map(len, request.sequence.blocks.values()))
            self.prefixes.forget(needed)
            full = self.pool.free < needed and bool(self.active)
            if full or self._is_being_read(request, request.sequence.length):
                request.sequence.close()
                request.sequence = None
                return
            request.reused = request.sequence.length
            self.active.append(self.waiting.popleft())

    def _is_being_read(self, request: Request, known: int) -> bool:
        """Whether another request reads a beginning that this one could have without computing it, a little later."""
        reading = (r.prompt for r in self.active if r.missing > 1)
        return any(agreement(prompt, request.prompt) >= known + PAGE for prompt in reading)

    def _plan(self) -> list[_Work]:
        """What each request has computed in this step, few tokens before many; pages for all of it are reserved."""
        answering = [r for r in self.active if r.missing == 1]
        planned = [(r, (r.generated or r.prompt)[-1:], self._draft(r)) for r in answering]
        few = 2 * len(answering) <= len(self.active)  # then reading helps more than it holds up
        room = self._chunk if few else self._busy_chunk
        for request in self.active:
            if request.missing > 1 and room:
                tokens = request.tokens[-request.missing :][:room]
                room -= len(tokens)
                planned.append((request, tokens, Draft()))
        for request, tokens, draft in planned:
            self._reserve(request, len(tokens) + len(draft.tokens))
        # Reserving for one may have cost another its pages.
        works = [_Work(r, r.sequence, tokens, draft) for r, tokens, draft in planned if r.sequence is not None]
        return sorted(works, key=lambda work: work.count)

    def _draft(self, request: Request) -> Draft:
        left = request.limit - len(request.generated) - 1  # one comes without guessing
        if self.speculator is None or request.matcher or left < 1:
            return Draft()
        return self.speculator.propose(request, left)

    def _reserve(self, request: Request, count: int) -> None:
        """Pages for the next tokens of a request, at the cost of old prompts and then of the youngest requests."""
        while request.sequence is not None:
            try:
                request.sequence.reserve(request.sequence.length + count)
                return
            except OutOfPages:
                self.prefixes.forget(1)
                if not self.pool.free:
                    self._postpone(self.active[-1])

    def _postpone(self, request: Request) -> None:
        """Take a request's pages away; it goes on later as if its answer so far were part of its prompt."""
        self.active.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _forward(self, works: list[_Work]) -> list[_Logits | None]:
        """Logits behind the tokens that need them: none while a prompt is being read."""
        if self.decode and self.decode.holds(len(works)) and all(w.count == w.request.missing == 1 for w in works):
            logits, best = self.decode([w.own[0] for w in works], [w.sequence for w in works])
            return [_Logits(logits[i : i + 1], best[i : i + 1]) for i in range(len(works))]
        batch = PagedBatch(self.pool, [Segment(w.sequence, w.sequence.length, w.count) for w in works])
        ids = torch.tensor([[i for w in works for i in (*w.own, *w.draft.tokens)]], device=self.model.device)
        hidden = self.model.hidden(ids, batch.positions, cache=batch)[0]
        ends = accumulate(w.count for w in works)
        wanted = [
            [] if len(w.own) < w.request.missing else list(range(end - len(w.draft.tokens) - 1, end))
            for w, end in zip(works, ends, strict=True)
        ]
        rows = [row for group in wanted for row in group]
        if not rows:
            return [None] * len(works)
        logits = self.model.head(hidden[rows])
        parts = iter(logits.split([len(group) for group in wanted if group]))
        greedy = any(work.request.params.likeliest for work in works)
        likeliest = iter(logits.argmax(-1).tolist() if greedy else repeat(-1))
        return [_Logits(next(parts), [next(likeliest) for _ in group]) if group else None for group in wanted]

    def _take(self, work: _Work, logits: _Logits) -> list[Sampled]:
        """The tokens that a request gains from its logits: one, and those of the draft that stand."""
        request, start = work.request, work.request.length
        sampled: list[Sampled] = []
        for place, (row, best) in enumerate(zip(logits.rows, logits.likeliest, strict=True)):
            try:
                token, stands = self._sample(request, row, best, work.draft, place)
            except CabochonError as error:  # a grammar that leads nowhere: the others go on
                request.failure, request.done = error, True
                break
            request.generated.append(token)
            logprob = None if request.params.logprobs is None else describe(row, token, request.params.logprobs)
            last = "length" if len(request.generated) >= request.limit else None
            last = "stop" if token in self.stop_ids else last
            sampled.append(Sampled(request, token, logprob, last))
            request.done = last is not None
            if request.done or not stands:
                break
        work.sequence.advance(max(start, start + len(sampled) - 1))
        request.events.extend(sampled)
        return sampled

    def _sample(self, request: Request, logits: Tensor, best: int, draft: Draft, place: int) -> tuple[int, bool]:
        """The next token, and whether it is the draft's, so that the logits behind the draft's may be used too."""
        if request.matcher is None and request.params.likeliest:
            return best, draft.tokens[place : place + 1] == (best,)
        if request.matcher is not None:
            logits = logits.masked_fill(~request.matcher.mask().to(logits.device), -torch.inf)
        adjusted = adjust(logits, request.params, request.prompt, request.generated)
        token, stands = accept(adjusted, request.params, draft, place, request.draw)
        if request.matcher is not None:
            request.matcher.accept(token)
        return token, stands

    def _remember(self, request: Request) -> None:
        """Keep pages that have become full for later prompts, and all of an answer that has ended."""
        held = request.sequence
        if held is not None and (request.done or held.length // PAGE > request.remembered):
            self.prefixes.remember(request.tokens, held, whole=request.done)
            request.remembered = held.length // PAGE

    def _end(self, request: Request) -> None:
        request.done = True
        self._remember(request)
        if request in self.active:
            self.active.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        if request.sequence is not None:
            request.sequence.close()
            request.sequence, request.remembered = None, 0
        if self.speculator:
            self.speculator.release(request)
