"""The chat in a terminal: a prompt with history and editing, and answers that appear while they are made."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from cabochon.base.errors import CabochonError
from cabochon.cli.render import render_stream
from cabochon.cli.repl import Ask, ChatSession, Leave, Say


def converse(session: ChatSession, name: str) -> None:
    """Runs the chat until the person leaves. No error of one message ends it."""
    console = Console(highlight=False)
    prompt: PromptSession[str] = PromptSession(
        HTML("<ansigreen><b>you</b></ansigreen> "), multiline=True, prompt_continuation="    ",
        key_bindings=_keys(), history=_history(),
    )  # fmt: skip
    console.print(f"Talking to {name}. /help lists the commands, Ctrl-D leaves.", style="dim")
    for line in _typed_lines(prompt, console):
        try:
            step = session.step(line)
            if isinstance(step, Leave):
                return
            if isinstance(step, Say):
                console.print(step.text, style="dim", markup=False)
            else:
                _answer(session, step, console)
        except CabochonError as error:
            console.print(str(error), style="red", markup=False)


def _typed_lines(prompt: PromptSession[str], console: Console) -> Iterator[str]:
    while True:
        try:
            line = prompt.prompt()
        except KeyboardInterrupt:
            console.print("Ctrl-D or /quit leaves.", style="dim")
            continue
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(session: ChatSession, ask: Ask, console: Console) -> None:
    """Shows an answer as it comes. Whatever happens, the session learns how far it got."""
    if ask.notice:
        console.print(ask.notice, style="yellow", markup=False)
    pieces: list[str] = []
    stream = None
    try:
        stream = session.model.stream_chat(ask.messages, **ask.sampling)
        render_stream(_collect(stream, pieces), console)
    except KeyboardInterrupt:
        console.print("stopped", style="dim")
        stream = None
    finally:
        session.record("".join(pieces))
    if stream is not None:
        console.print(_speed(stream.completion), style="dim")


def _collect(stream: Iterable[str], pieces: list[str]) -> Iterator[str]:
    for piece in stream:
        pieces.append(piece)
        yield piece


def _speed(completion: Any) -> str:
    usage = completion.usage
    rate = usage.completion_tokens / usage.seconds if usage.seconds > 0 else 0.0
    cut = " · cut at the longest length" if completion.finish_reason == "length" else ""
    return f"{usage.completion_tokens} tokens · {rate:.1f} tokens/s{cut}"


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter and a trailing backslash begin a new line; pasted newlines stay newlines."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_path() -> Path:
    """Where typed messages are kept: the state folder of the user, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "cabochon" / "history"


def _history() -> History:
    """History that only its owner can read; in memory where no file can be written."""
    try:
        path = history_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError) as error:
        print(f"note: the history is not kept: {error}", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(path)
