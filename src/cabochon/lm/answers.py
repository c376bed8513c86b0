"""Answers on their way: requests of the engine turned into text, piece by piece."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cabochon.base.errors import UsageError, nearest
from cabochon.generate.engine import Engine
from cabochon.generate.grammar import Constraint
from cabochon.generate.request import Matcher, Request, Sampled
from cabochon.generate.sampling import SamplingParams, TokenLogprob
from cabochon.text.detokenize import StreamDecoder
from cabochon.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Usage:
    """Tokens in and out, and seconds from the call to the first and to the last token."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt: known from earlier prompts and answers, not computed again
    completion_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Completion:
    """One answer. `finish_reason` is "stop" (the model or a stop string ended it) or "length"."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    usage: Usage


_CONSTRAINTS = ("json_schema", "regex", "choice")


def sampling_params(**sampling: Any) -> SamplingParams:
    """`SamplingParams` from keywords, with an error that names the nearest field for an unknown one.

    `json_schema` (JSON text, a dict or a pydantic model; True for any object), `regex` and `choice` make a constraint.
    """
    names = [*(f.name for f in fields(SamplingParams)), *_CONSTRAINTS]
    for name in sampling:
        if name not in names:
            close = nearest(name, names)
            raise UsageError(
                f"no sampling setting named {name!r}",
                f"there are {', '.join(names)}",
                f"did you mean {close!r}?" if close else "use one of these",
            )
    if isinstance(sampling.get("stop"), list):
        sampling["stop"] = tuple(sampling["stop"])
    elif isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    wanted = {name: sampling.pop(name) for name in _CONSTRAINTS if sampling.get(name) is not None}
    if wanted:
        schema = wanted.pop("json_schema", None)
        if schema is not None and not wanted:
            sampling["constraint"] = Constraint.json(None if schema is True else schema)
        else:
            choice = tuple(wanted.pop("choice", ()))
            sampling["constraint"] = Constraint(json_schema=None if schema is None else "{}", choice=choice, **wanted)
    return SamplingParams(**{"max_new_tokens": 256, **sampling})


@dataclass
class _Row:
    """One answer: its request, and the text so far."""

    request: Request
    decoder: StreamDecoder | None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "length"
    first: float = 0.0
    seconds: float = 0.0

    def take(self, sampled: Sampled, seconds: float) -> str:
        """The text that a token makes whole, which can be none."""
        self.seconds = seconds
        self.first = self.first or seconds
        if sampled.logprob:
            self.logprobs.append(sampled.logprob)
        piece = self.decoder.push(sampled.token) if self.decoder and sampled.last != "stop" else ""
        if sampled.last and self.decoder:
            piece += self.decoder.finish()
        if sampled.last:
            self.finish_reason = sampled.last
        self.pieces.append(piece)
        return piece


class Answers:
    """Answers to several prompts at once, `params.n` neighbouring ones for each."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        matcher: Callable[[], Matcher] | None = None,
    ) -> None:
        self._engine, self._params, self._started = engine, params, time.perf_counter()
        self._rows: list[_Row] = []
        try:
            for prompt in prompts:
                for choice in range(params.n):
                    decoder = StreamDecoder(tokenizer, params.stop) if tokenizer else None
                    request = engine.submit(prompt, params, choice, matcher() if matcher else None)
                    self._rows.append(_Row(request, decoder))
        except BaseException:
            self.cancel()
            raise

    def run(self) -> Generator[tuple[int, str]]:
        """Pieces of text with their row's number, in the order they are ready. Closing it cancels what is left."""
        try:
            live = list(enumerate(self._rows))
            while live:
                for number, row in live:
                    yield from ((number, piece) for piece in self._pieces(row) if piece)
                    if row.request.failure:
                        raise row.request.failure
                live = [(number, row) for number, row in live if row.request.events or not row.request.done]
                if live and not any(row.request.events for _, row in live):
                    self._engine.step()
        finally:
            self.cancel()

    def _pieces(self, row: _Row) -> Iterator[str]:
        while row.request.events:
            yield row.take(row.request.events.popleft(), time.perf_counter() - self._started)
            if row.decoder and row.decoder.stopped:
                self._engine.cancel(row.request)
                row.request.events.clear()  # what speculation found behind the stop text
                row.finish_reason = "stop"

    def cancel(self) -> None:
        """End whatever still runs."""
        for row in self._rows:
            self._engine.cancel(row.request)

    def completion(self, number: int) -> Completion:
        """The answer of a row so far, as it would be had it ended here."""
        row = self._rows[number]
        taken = row.request.generated[: len(row.pieces)]
        usage = Usage(len(row.request.prompt), row.request.reused, len(taken), row.first, row.seconds)
        logprobs = None if self._params.logprobs is None else row.logprobs
        return Completion("".join(row.pieces), taken, logprobs, row.finish_reason, usage)


class Stream(Iterator[str]):
    """Pieces of one answer as they come; whole characters only. `completion` is there after the last."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._run = answers.run()

    def __next__(self) -> str:
        return next(self._run)[1]

    def close(self) -> None:
        """End the answer here and free its memory."""
        self._run.close()
        self._answers.cancel()

    def __del__(self) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """The answer so far, as it would be had it ended here."""
        return self._answers.completion(0)
