"""A language model for tests of the command line: it answers at once, and with what it was asked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Usage:
    prompt_tokens: int = 3
    completion_tokens: int = 2
    first_token_seconds: float = 0.1
    seconds: float = 0.5


class FakeStream:
    def __init__(self, pieces: Sequence[str | BaseException]) -> None:
        self._pieces = pieces
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        self.completion = SimpleNamespace(text=text, finish_reason="stop", usage=Usage())

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@dataclass
class FakeLM:
    """Counts one token per word and echoes the last message, or plays the `script` of pieces."""

    context_length: int = 100
    script: list[Sequence[str | BaseException]] = field(default_factory=list)
    turn_tokens: bool = True
    asked: list[Any] = field(default_factory=list)
    sampling: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text_tokenizer(self) -> Any:
        return SimpleNamespace(start_of_turn_id=106 if self.turn_tokens else None)

    def count_chat(self, messages: Sequence[Any]) -> int:
        return sum(len(message["content"].split()) for message in messages)

    def stream_chat(self, messages: Sequence[Any], **sampling: Any) -> FakeStream:
        return self.stream(messages, **sampling)

    def stream(self, prompt: Any, **sampling: Any) -> FakeStream:
        self.asked.append(prompt)
        self.sampling.append(sampling)
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return FakeStream(self.script.pop(0) if self.script else ["echo ", last])

    def chat(self, messages: Sequence[Any], **sampling: Any) -> Any:
        return self.stream(messages, **sampling).completion

    def generate(self, prompt: str, **sampling: Any) -> Any:
        return self.stream(prompt, **sampling).completion
