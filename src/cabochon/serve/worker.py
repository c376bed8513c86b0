"""The thread that steps the engine. Everything that touches the engine happens here, between two steps.

What a step yields goes to the event loop in one piece, so that the loop wakes up once per step and not per token. Every
stream that it then writes to takes the interpreter away from the engine. So what short steps yield goes together, such
that all streams get `EVENTS` a second between them. The first token of an answer and its end never wait.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cabochon.generate.engine import Engine
from cabochon.generate.request import Matcher, Request, Sampled
from cabochon.serve.job import Job, Piece
from cabochon.text.detokenize import StreamDecoder
from cabochon.text.tokenizer import Tokenizer

LOG = logging.getLogger("cabochon.serve")
EVENTS = 1000  # a second
_MAX_FAILURES = 3  # steps in a row that break before the engine counts as dead
Batch = list[tuple[Job, list[Piece]]]


class Listener(Protocol):
    """Who hears of what happens, on the event loop."""

    def delivered(self, batch: Batch) -> None:
        """What steps have yielded."""

    def lost(self, job: Job, rows: int, error: Exception | None) -> None:
        """Answers that ended without a last piece: cancelled, or with an error."""

    def died(self) -> None:
        """The engine cannot go on."""


@dataclass(eq=False)
class _Row:
    job: Job
    number: int
    request: Request
    decoder: StreamDecoder
    begun: bool = False


class EngineThread:
    """Steps an engine as long as it has something to do. The public methods may be called from any thread."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, loop: asyncio.AbstractEventLoop, listener: Listener
    ) -> None:
        self._engine, self._tokenizer, self._loop, self._listener = engine, tokenizer, loop, listener
        self._commands: deque[Callable[[], None]] = deque()  # beginnings and ends, which take no time
        self._calls: deque[Callable[[], None]] = deque()  # what may take as long as a step, or longer
        self._wake = threading.Condition()
        self._stopping = self._dead = False
        self._rows: dict[Request, _Row] = {}
        self._constrained: set[Request] = set()  # those that can fail between two tokens
        self._unsent: dict[Job, list[Piece]] = {}
        self._sent, self._failures = 0.0, 0
        self._thread = threading.Thread(target=self._work, name="cabochon-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, matchers: Sequence[Matcher | None]) -> None:
        """Begin the answers of a job, a matcher for each."""
        self._post(self._commands, lambda: self._submit(job, matchers))

    def cancel(self, job: Job) -> None:
        """End what is left of a job."""
        self._post(self._commands, lambda: self._cancel(job, None))

    def call(self, function: Callable[[], None]) -> None:
        """Run something on this thread, one such function between two steps. It raises nothing."""
        self._post(self._calls, function)

    def tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Run something on the event loop."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self._stopping = True

    def close(self) -> None:
        """End the thread, after the step that it is in."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        self._thread.join()

    def _post(self, queue: deque[Callable[[], None]], command: Callable[[], None]) -> None:
        queue.append(command)
        with self._wake:
            self._wake.notify()

    def _work(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # a defect here: nobody may wait for a thread that is gone
                LOG.exception("the engine's thread broke")
                self._die(error)

    def _turn(self) -> None:
        """What is to be done before a step, and the step; or wait for something to do."""
        while self._commands:
            self._commands.popleft()()
        if self._calls:
            self._calls.popleft()()
        if not self._dead and not self._engine.idle:
            self._step()
            return
        with self._wake:
            if not self._commands and not self._calls and not self._stopping:
                self._wake.wait()

    def _submit(self, job: Job, matchers: Sequence[Matcher | None]) -> None:
        if job.cancelled or self._dead:
            error = RuntimeError("the engine has stopped") if self._dead else None
            self.tell(self._listener.lost, job, job.rows, error)
            return
        for number in range(job.rows):
            prompt, choice = divmod(number, job.params.n)
            try:
                request = self._engine.submit(job.prompts[prompt], job.params, choice, matchers[number])
            except Exception as error:
                self.tell(self._listener.lost, job, job.rows - number, error)
                self._cancel(job, error)
                return
            self._rows[request] = _Row(job, number, request, StreamDecoder(self._tokenizer, job.params.stop))
            if matchers[number]:
                self._constrained.add(request)

    def _cancel(self, job: Job, error: Exception | None) -> None:
        self._send([job])
        mine = [row for row in self._rows.values() if row.job is job]
        for row in mine:
            self._engine.cancel(row.request)
            self._forget(row)
        if mine:
            self.tell(self._listener.lost, job, len(mine), error)

    def _forget(self, row: _Row) -> None:
        del self._rows[row.request]
        self._constrained.discard(row.request)

    def _step(self) -> None:
        try:
            sampled = self._engine.step()
            self._failures = 0
        except Exception as error:
            LOG.exception("a step of the engine broke")
            self._recover(error)
            return
        urgent: dict[Job, None] = {}
        for one in sampled:
            one.request.events.clear()  # they are in `sampled` as well
            row = self._rows.get(one.request)
            if row:
                piece = self._piece(row, one)
                self._unsent.setdefault(row.job, []).append(piece)
                if piece.finish_reason or not row.begun:
                    urgent[row.job] = None
                row.begun = True
        if time.monotonic() - self._sent >= len(self._unsent) / EVENTS:
            self._send(list(self._unsent))
            self._sent = time.monotonic()
        else:
            self._send(list(urgent))
        failed = {self._rows[r].job: r.failure for r in self._constrained if r.failure}
        for job, failure in failed.items():
            self._cancel(job, failure)

    def _send(self, jobs: Sequence[Job]) -> None:
        """What these have not been told yet."""
        batch = [(job, self._unsent.pop(job)) for job in jobs if job in self._unsent]
        if batch:
            self.tell(self._listener.delivered, batch)

    def _piece(self, row: _Row, sampled: Sampled) -> Piece:
        text = row.decoder.push(sampled.token) if sampled.last != "stop" else ""
        last = sampled.last
        if last:
            text += row.decoder.finish()
        if row.decoder.stopped:
            last = "stop"
            self._engine.cancel(row.request)
        if last:
            row.job.cached[row.number] = row.request.reused
            self._forget(row)
        logprob = None if sampled.last == "stop" else sampled.logprob  # an end token is no part of the answer
        return Piece(row.number, text, sampled.token, logprob, last)

    def _recover(self, error: Exception) -> None:
        """A step that breaks takes along what it computed; after a few in a row, nothing more is tried."""
        self._failures += 1
        for job in {row.job for row in self._rows.values()}:
            try:
                self._cancel(job, error)
            except Exception:
                LOG.exception("a request cannot be cancelled")
                self._failures = _MAX_FAILURES
        if self._failures >= _MAX_FAILURES:
            self._die(error)

    def _die(self, error: Exception) -> None:
        """Take nothing more on, and tell all who wait."""
        self._dead = True
        self.tell(self._listener.died)
        waiting = Counter(row.job for row in self._rows.values())
        for held in (self._rows, self._constrained, self._unsent):
            held.clear()
        for job, rows in waiting.items():
            self.tell(self._listener.lost, job, rows, error)
