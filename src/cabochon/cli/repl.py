"""What a chat remembers and what each typed line means, without any terminal.

`ChatSession.step` turns a line into a step: something to say, a question for the model, or the end. The
caller shows it; after a question it hands the answer to `record`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cabochon.base.errors import BadInput, UsageError, nearest
from cabochon.cli.transcript import Transcript, read_transcript, write_transcript
from cabochon.text.chat import Message, fold_system

REGENERATION_TEMPERATURE = 0.8


class AnswerStream(Protocol):
    """Pieces of text as they come; `completion` is there after the last one."""

    @property
    def completion(self) -> Any: ...

    def __iter__(self) -> Iterator[str]: ...


class ChatModel(Protocol):
    """The part of `LM` that a chat needs."""

    @property
    def context_length(self) -> int: ...

    def count_chat(self, messages: Sequence[Message]) -> int: ...

    def stream_chat(self, messages: Sequence[Message], **sampling: Any) -> AnswerStream: ...


@dataclass(frozen=True)
class Say:
    """Text for the person, which the model never sees."""

    text: str


@dataclass(frozen=True)
class Ask:
    """A question: what to send to the model, and what the person should know about it."""

    messages: list[Message]
    sampling: Mapping[str, Any]
    notice: str | None = None


@dataclass(frozen=True)
class Leave:
    """The chat is over."""


Step = Say | Ask | Leave


@dataclass
class ChatSession:
    """One conversation: complete turns, and at most one question whose answer is awaited."""

    model: ChatModel
    sampling: Mapping[str, Any]
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # (what was asked, what was answered)
    pending: str | None = None
    attempt: int = 0
    replaced: tuple[str, str] | None = None  # the turn that a regeneration may replace

    def step(self, line: str) -> Step:
        """What to do about a typed line. Raises `CabochonError`; the conversation is then as it was before."""
        text = line.strip()
        if not line.startswith("/"):
            return self._ask(text) if text else Say("Type a message, or /help.")
        name, _, argument = text[1:].partition(" ")
        if name not in COMMANDS:
            guess = nearest(name, COMMANDS)
            hint = f"did you mean /{guess}?" if guess else "/help lists all commands"
            hint += " To send the line as a message, begin it with a space"
            raise UsageError(f"there is no command /{name}", "lines that begin with / are commands", hint)
        return COMMANDS[name][0](self, argument.strip())

    def record(self, answer: str) -> None:
        """Takes the answer, whole or cut short, to the question asked last.

        Without any text the conversation is as it was before the question.
        """
        assert self.pending is not None, "no question was asked"
        if answer.strip():
            self.turns.append((self.pending, answer.strip()))
        elif self.replaced:
            self.turns.append(self.replaced)
        self.pending = self.replaced = None

    def _ask(self, question: str) -> Ask:
        """Makes the conversation fit into the context, its oldest turns dropped if need be."""
        for dropped in range(len(self.turns) + 1):
            messages = self._messages(self.turns[dropped:], question)
            used = self.model.count_chat(messages)
            if used <= self._room_for_prompt():
                break
        room = self.model.context_length - used
        if room < 1:
            raise BadInput(
                "the message is too long",
                f"it takes {used} tokens and the model's context holds {self.model.context_length}",
                "shorten it, or send it in parts after /reset",
            )
        del self.turns[:dropped]
        self.pending, self.attempt = question, 0
        sampling = {**self.sampling, "max_new_tokens": min(room, self.sampling.get("max_new_tokens") or room)}
        return Ask(messages, sampling, _dropped_notice(dropped))

    def _room_for_prompt(self) -> int:
        """Tokens of context for the conversation, so that an answer of fair length still fits behind it."""
        context = self.model.context_length
        return context - min(self.sampling.get("max_new_tokens") or context, context // 4)

    def _messages(self, turns: Sequence[tuple[str, str]], question: str) -> list[Message]:
        messages: list[Message] = []
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "model", "content": answered}]
        messages.append({"role": "user", "content": question})
        return fold_system(messages, self.system) if self.system else messages

    def _help(self, _: str) -> Step:
        lines = [f"/{name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
        return Say(
            "\n".join(
                [
                    *lines,
                    "",
                    "Alt-Enter or a \\ at the end of a line: go on in a new line.",
                    "Ctrl-C: stop the answer.  Ctrl-D: leave.",
                ]
            )
        )

    def _reset(self, _: str) -> Step:
        self.turns, self.pending = [], None
        return Say("The conversation starts anew.")

    def _system(self, text: str) -> Step:
        if not text:
            return Say(f"System prompt: {self.system}" if self.system else "There is no system prompt.")
        self.system = None if text == "-" else text
        return Say("System prompt set." if self.system else "System prompt removed.")

    def _save(self, name: str) -> Step:
        path = _path(name, "/save")
        write_transcript(path, Transcript(self.system, self.turns))
        return Say(f"Saved {_count(len(self.turns))} to {path}.")

    def _load(self, name: str) -> Step:
        loaded = read_transcript(_path(name, "/load"))
        self.system, self.turns, self.pending = loaded.system, loaded.turns, None
        return Say(f"Loaded {_count(len(self.turns))}.")

    def _regenerate(self, _: str) -> Step:
        if not self.turns:
            return Say("There is no answer yet.")
        attempt, replaced = self.attempt + 1, self.turns.pop()
        try:
            ask = self._ask(replaced[0])
        except BaseException:
            self.turns.append(replaced)
            raise
        self.attempt, self.replaced = attempt, replaced
        return Ask(ask.messages, _vary(ask.sampling, attempt), ask.notice)

    def _quit(self, _: str) -> Step:
        return Leave()


def _vary(sampling: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    """Another draw: the greedy answer, or the same seed, would only come out the same."""
    seed = sampling.get("seed")
    return {
        **sampling,
        "temperature": sampling.get("temperature") or REGENERATION_TEMPERATURE,
        "seed": None if seed is None else seed + attempt,
    }


def _path(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command} needs a file", "no name was given", f"type {command} chat.json")
    return Path(name).expanduser()


def _count(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


def _dropped_notice(dropped: int) -> str | None:
    return f"The context is full: the oldest {_count(dropped)} left the conversation." if dropped else None


COMMANDS: dict[str, tuple[Callable[[ChatSession, str], Step], str]] = {
    "help": (ChatSession._help, "this list"),
    "reset": (ChatSession._reset, "forget the conversation, keep the system prompt"),
    "system": (ChatSession._system, "TEXT: set the system prompt; alone: show it; -: remove it"),
    "save": (ChatSession._save, "FILE: write the conversation"),
    "load": (ChatSession._load, "FILE: go on with a saved conversation"),
    "regenerate": (
        ChatSession._regenerate,
        "another answer to the last message (sampled, even in a greedy chat)",
    ),
    "quit": (ChatSession._quit, "leave"),
}
