"""Answers in OpenAI's shapes: whole bodies, and the order of chunks in a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from cabochon.generate.sampling import TokenLogprob
from cabochon.serve.errors import ApiError
from cabochon.serve.job import Job, Piece
from cabochon.serve.tools import CallReader
from cabochon.serve.wire import Row, event
from cabochon.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def usage(job: Job) -> dict[str, Any]:
    """Tokens in and out. A prompt with several answers counts once."""
    out = sum(job.tokens)
    cached = sum(job.cached[:: job.params.n])
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": out,
        "total_tokens": job.prompt_tokens + out,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Shape:
    """What the bodies and chunks of one answer have in common. `kind` is chat.completion or text_completion."""

    chunk_kind, prefix = "", ""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer, include_usage: bool = False) -> None:
        self.job, self.tokenizer, self.include_usage = job, tokenizer, include_usage
        self._head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A whole answer."""
        return {**self._head, "object": kind, "choices": choices, "usage": usage(self.job)}

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        """A part of a stream. `usage` is null in all but the last, and absent unless it was asked for."""
        content = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self.include_usage:
            content["usage"] = None if choices else usage(self.job)
        return event(content)

    def end(self) -> bytes:
        """After the last token."""
        return (self.chunk([]) if self.include_usage else b"") + DONE

    def fail(self, error: ApiError) -> bytes:
        """Instead of the rest."""
        return event(error.body) + DONE

    def spell(self, token: int) -> bytes:
        """The bytes of a token; control pieces, which add nothing to a text, by their name."""
        return self.tokenizer.token_bytes(token) or self.tokenizer.decode([token], skip_control=False).encode()


class ChatShape(Shape):
    """/v1/chat/completions"""

    chunk_kind, prefix = "chat.completion.chunk", "chatcmpl-"

    def __init__(
        self, job: Job, model: str, tokenizer: Tokenizer, include_usage: bool = False, *, tools: bool = False
    ) -> None:
        super().__init__(job, model, tokenizer, include_usage)
        self._readers = [CallReader() for _ in range(job.rows)] if tools else None

    def begin(self) -> bytes:
        """The role, once for each answer."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._choice(row, role) for row in range(self.job.rows))

    def take(self, pieces: Sequence[Piece]) -> bytes:
        """What came of each answer in one chunk, then the reason for the end."""
        return b"".join(self._more(row, came) for row, came in by_row(pieces).items())

    def whole(self, rows: Sequence[Row]) -> dict[str, Any]:
        """All answers in one body."""
        choices = []
        for index, row in enumerate(rows):
            message, reason = self._message(index, row)
            logprobs = self._logprobs(row.pieces)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return self.body("chat.completion", choices)

    def _message(self, index: int, row: Row) -> tuple[dict[str, Any], str]:
        message: dict[str, Any] = {"role": "assistant", "content": row.text, "refusal": None}
        if not self._readers:
            return message, row.finish_reason
        reader = self._readers[index]
        deltas = reader.push(row.text) + reader.finish(row.finish_reason == "stop")
        if not reader.called:
            return message, row.finish_reason
        functions = [delta["tool_calls"][0] for delta in deltas]
        first = functions[0]
        arguments = "".join(f["function"]["arguments"] for f in functions)
        call = {"id": first["id"], "type": "function"}
        call["function"] = {"name": first["function"]["name"], "arguments": arguments}
        message |= {"content": None, "tool_calls": [call]}
        return message, "tool_calls" if row.finish_reason == "stop" else row.finish_reason

    def _more(self, row: int, pieces: Sequence[Piece]) -> bytes:
        logprobs, text = self._logprobs(pieces), "".join(piece.text for piece in pieces)
        reason = pieces[-1].finish_reason
        if self._readers:
            reader = self._readers[row]
            deltas = reader.push(text)
            if reason:
                deltas += reader.finish(reason == "stop")
                reason = "tool_calls" if reason == "stop" and reader.called else reason
        else:
            deltas = [{"content": text}] if text else []
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        chunks = [self._choice(row, d, logprobs if i == 0 else None) for i, d in enumerate(deltas)]
        if reason:
            chunks.append(self._choice(row, {}, reason=reason))
        return b"".join(chunks)

    def _choice(self, row: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        return self.chunk([{"index": row, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self.job.params.logprobs is None:
            return None
        content = [self._logprob(piece.logprob) for piece in pieces if piece.logprob]
        return {"content": content, "refusal": None}

    def _logprob(self, logprob: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in logprob.top]
        return {**self._token(logprob.token_id, logprob.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.spell(token)
        return {"token": spelled.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(spelled)}


class TextShape(Shape):
    """/v1/completions. `echoed` is what an answer to each prompt begins with."""

    chunk_kind, prefix = "text_completion", "cmpl-"

    def __init__(
        self, job: Job, model: str, tokenizer: Tokenizer, include_usage: bool = False, *, echoed: Sequence[str] = ()
    ) -> None:
        super().__init__(job, model, tokenizer, include_usage)
        self._echoed = [echoed[row // job.params.n] if echoed else "" for row in range(job.rows)]
        self._offsets = [len(text) for text in self._echoed]

    def begin(self) -> bytes:
        """The prompts, where they were asked for."""
        return b"".join(self._choice(row, text, None, None) for row, text in enumerate(self._echoed) if text)

    def take(self, pieces: Sequence[Piece]) -> bytes:
        """What came of each answer in one chunk, and the reason with the last."""
        return b"".join(self._more(row, came) for row, came in by_row(pieces).items())

    def _more(self, row: int, pieces: Sequence[Piece]) -> bytes:
        text, reason = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
        if not (text or reason or any(piece.logprob for piece in pieces)):
            return b""
        return self._choice(row, text, self._logprobs(row, pieces), reason)

    def whole(self, rows: Sequence[Row]) -> dict[str, Any]:
        """All answers in one body."""
        choices = [
            {
                "index": index,
                "text": self._echoed[index] + row.text,
                "logprobs": self._logprobs(index, row.pieces),
                "finish_reason": row.finish_reason,
            }
            for index, row in enumerate(rows)
        ]
        return self.body("text_completion", choices)

    def _choice(self, row: int, text: str, logprobs: Any, reason: str | None) -> bytes:
        return self.chunk([{"index": row, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def _logprobs(self, row: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self.job.params.logprobs is None:
            return None
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            if piece.logprob:
                spelled = self.spell(piece.token).decode(errors="replace")
                top = {self.spell(t).decode(errors="replace"): finite(v) for t, v in piece.logprob.top}
                out["tokens"].append(spelled)
                out["token_logprobs"].append(finite(piece.logprob.logprob))
                out["top_logprobs"].append(top)
                out["text_offset"].append(self._offsets[row])
            self._offsets[row] += len(piece.text)
        return out


def by_row(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    """The pieces of each answer, in their order."""
    rows: dict[int, list[Piece]] = {}
    for piece in pieces:
        rows.setdefault(piece.row, []).append(piece)
    return rows


def finite(value: float) -> float:
    """A log-probability as JSON can say it."""
    return max(value, -9999.0)
