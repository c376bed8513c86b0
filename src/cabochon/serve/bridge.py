"""Between asyncio and the engine: what is asked for, how much of it at a time, and what became of it."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cabochon.base.errors import CabochonError
from cabochon.generate.request import Matcher
from cabochon.generate.sampling import SamplingParams
from cabochon.lm import LM
from cabochon.model.paged import pages_for
from cabochon.serve.errors import ApiError, spoken, unavailable
from cabochon.serve.job import Job
from cabochon.serve.metrics import Gauge, Metrics
from cabochon.serve.worker import Batch, EngineThread

T = TypeVar("T")
_MAX_TEXTS = 128  # long texts that wait to be split, 10 ms to a second each


class Bridge:
    """A model that any number of tasks may ask. Made and used on the event loop.

    Args:
        max_waiting: answers that may wait for a place beside those that the engine runs.
        deadline: seconds after which a job ends with 503.

    Attributes:
        pending: answers that were asked for and have not ended.
        longest: tokens of prompt and answer that one request may have.
    """

    def __init__(self, lm: LM, metrics: Metrics, *, max_waiting: int, deadline: float) -> None:
        self.lm, self.metrics, self.deadline = lm, metrics, deadline
        self.tokenizer, self._engine = lm.text_tokenizer, lm.engine
        self.capacity = self._engine.config.max_requests + max_waiting
        self.longest = longest_request(lm)
        self.pending = 0
        self.draining = self.dead = False
        self._loop = asyncio.get_running_loop()
        self._texts = ThreadPoolExecutor(2, "cabochon-text")
        self._schemas = ThreadPoolExecutor(1, "cabochon-schema")  # apart: one may take a second
        self._texts_waiting = 0
        self._empty = asyncio.Event()
        self._ended: deque[float] = deque(maxlen=64)  # when the last answers ended
        self._thread = EngineThread(self._engine, self.tokenizer, self._loop, self)
        metrics.gauges |= self._gauges()

    async def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Job:
        """Queue prompts, `params.n` answers each. Prompt and answer have to fit `longest`.

        Raises `ApiError`: 429 when too many wait, 503 when the server is ending, 422 for an unusable constraint.
        """
        job = Job(prompts, params)
        self._admit(job.rows)
        try:
            matchers = await self._matchers(job)
        except BaseException:
            self._release(job.rows)
            raise
        self.metrics.prompt_tokens.add(job.prompt_tokens)
        job.timer = self._loop.call_later(self.deadline, self._expire, job)
        self._thread.submit(job, matchers)
        return job

    def check_room(self, rows: int = 1) -> None:
        """Raises what `submit` would, before any work is put into a request."""
        if self.dead:
            raise unavailable("the engine has stopped", "engine_dead")
        if self.draining:
            raise unavailable("the server is ending", "draining")
        if self.pending + rows > self.capacity:
            raise self._full()

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more: free what it holds. Without effect when it has ended."""
        if job.left and not job.cancelled:
            job.cancelled = True
            self.metrics.cancelled.add(job.left)
            self._thread.cancel(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread, between two steps. Raises as `submit`, and what it raises."""
        self._admit(1)
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            if future.done():  # nobody waits any more
                return
            try:
                result = function()
            except Exception as error:
                self._thread.tell(_settle, future, None, error)
            else:
                self._thread.tell(_settle, future, result, None)

        try:
            self._thread.call(run)
            return await asyncio.wait_for(future, self.deadline)
        except TimeoutError:
            raise unavailable(f"no answer within {self.deadline:g} seconds", "timeout") from None
        finally:
            self._release(1)

    async def text(self, function: Callable[[], T]) -> T:
        """Run a function that may take long and needs no engine, such as splitting a text into tokens.

        Raises `ApiError` (429) when too many wait for that.
        """
        if self._texts_waiting >= _MAX_TEXTS:
            raise self._full()
        self._texts_waiting += 1
        try:
            return await self._loop.run_in_executor(self._texts, function)
        finally:
            self._texts_waiting -= 1

    async def drain(self, seconds: float) -> bool:
        """Take nothing more on and wait for what runs; whether all of it ended in time."""
        self.draining = True
        if self.pending:
            try:
                await asyncio.wait_for(self._empty.wait(), seconds)
            except TimeoutError:
                return False
        return True

    def close(self) -> None:
        """End the engine's thread after the step that it is in. Must not be called while it is needed."""
        self._thread.close()
        for pool in (self._texts, self._schemas):
            pool.shutdown(wait=False, cancel_futures=True)

    # What the engine's thread says

    def delivered(self, batch: Batch) -> None:
        """What steps have yielded."""
        now, count = time.perf_counter(), 0
        for job, pieces in batch:
            for piece in pieces:
                if not job.tokens[piece.row]:
                    job.first[piece.row] = now
                    self.metrics.first_token.observe(now - job.created)
                job.tokens[piece.row] += 1
                if piece.finish_reason:
                    self._finished(job, piece.row, now)
            count += len(pieces)
            job.deliver(pieces)
        self.metrics.generated_tokens.add(count)

    def lost(self, job: Job, rows: int, error: Exception | None) -> None:
        """Some answers of a job ended without a last piece."""
        job.ended(rows)
        self._release(rows)
        if error:
            job.fail(error if isinstance(error, CabochonError) else _engine_failed(error))

    def died(self) -> None:
        """The engine cannot go on: /health says so, and whatever watches it starts another server."""
        self.dead = True

    def _finished(self, job: Job, row: int, now: float) -> None:
        job.ended(1)
        self._release(1)
        tokens = job.tokens[row]
        self.metrics.duration.observe(now - job.created)
        self.metrics.answer_tokens.observe(tokens)
        self.metrics.cached_tokens.add(job.cached[row])
        if tokens > 1:
            self.metrics.per_token.observe((now - job.first[row]) / (tokens - 1))

    # How much at a time

    def _admit(self, rows: int) -> None:
        self.check_room(rows)
        self.pending += rows

    def _full(self) -> ApiError:
        self.metrics.refused.add()
        after = {"Retry-After": str(self._retry_after())}
        return ApiError(429, "too many requests are waiting; try again later", code="queue_full", headers=after)

    def _release(self, rows: int) -> None:
        self.pending -= rows
        self._ended.extend([time.perf_counter()] * min(rows, 64))
        if self.draining and not self.pending:
            self._empty.set()

    def _retry_after(self) -> int:
        """Seconds in which half of what waits is likely to be over."""
        if len(self._ended) < 2:
            return 1
        each = (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1)
        return round(min(60, max(1, self.pending / 2 * each)))

    def _expire(self, job: Job) -> None:
        job.fail(unavailable(f"no whole answer within {self.deadline:g} seconds", "timeout"))
        self.cancel(job)

    async def _matchers(self, job: Job) -> Sequence[Matcher | None]:
        wanted = job.params.constraint
        if wanted is None:
            return [None] * job.rows

        def compiled() -> list[Matcher]:
            return [self.lm.grammars.compile(wanted) for _ in range(job.rows)]

        try:
            return await self._loop.run_in_executor(self._schemas, compiled)
        except CabochonError as error:
            raise ApiError(422, spoken(error), code="unusable_constraint", param="response_format") from None

    def _gauges(self) -> dict[str, Gauge]:
        engine, pool = self._engine, self._engine.pool
        return {
            "requests_running": Gauge("Answers that the engine computes.", lambda: len(engine.active)),
            "requests_waiting": Gauge(
                "Answers that wait for a place.", lambda: max(0, self.pending - len(engine.active))
            ),
            "cache_used_ratio": Gauge(
                "Share of the pages for keys and values that hold something, earlier prompts included.",
                lambda: 1 - pool.free / pool.pages,
            ),
            "ready": Gauge("Whether requests are taken on.", lambda: not (self.draining or self.dead)),
        }


def longest_request(lm: LM) -> int:
    """Tokens of prompt and answer for which the whole cache has pages: at most the context."""
    pages, low, high = lm.engine.pool.pages, 1, lm.context_length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pages_for(lm.config, middle) <= pages else (low, middle - 1)
    return low


def _settle(future: "asyncio.Future[T]", result: T, error: Exception | None) -> None:
    if future.done():  # nobody waits any more
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _engine_failed(error: Exception) -> ApiError:
    failed = unavailable("the engine failed while computing this answer", "engine_failed", after=1)
    failed.__cause__ = error
    return failed
