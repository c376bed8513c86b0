"""Saved conversations: a small JSON file that is checked as a whole before any of it is used."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.base.files import atomic_write

FORMAT = "cabochon-chat-1"
MAX_BYTES = 16 << 20  # far beyond any context; keeps a wrong file name from filling the memory


@dataclass(frozen=True)
class Transcript:
    """A conversation at rest: the system prompt and the complete turns, (asked, answered) each."""

    system: str | None
    turns: list[tuple[str, str]]


def write_transcript(path: Path, transcript: Transcript) -> None:
    """Writes the file whole or not at all. Refuses to replace a file that is not a saved conversation."""
    if path.exists():
        try:
            read_transcript(path)
        except CabochonError:
            raise BadInput(
                f"{path} was not written",
                "a file of that name exists and is no saved conversation",
                "choose another name",
            ) from None
    messages = [
        {"role": role, "content": content}
        for turn in transcript.turns
        for role, content in zip(("user", "model"), turn, strict=True)
    ]
    document = {"format": FORMAT, "system": transcript.system, "messages": messages}
    try:
        with atomic_write(path) as file:
            file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())
    except OSError as error:
        raise MissingResource(f"{path} was not written", error.strerror or str(error), "choose another place") from None


def read_transcript(path: Path) -> Transcript:
    """The conversation in a file. Raises `MissingResource` without the file, `BadInput` for any other content."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MissingResource(f"{path} cannot be read", error.strerror or str(error), "check the name") from None
    if len(raw) > MAX_BYTES:
        raise _bad(path, f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError):
        raise _bad(path, "it is not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _bad(path, f"its format is not {FORMAT}")
    if set(document) != {"format", "system", "messages"}:
        raise _bad(path, "it has to hold format, system and messages, and nothing else")
    system, messages = document["system"], document["messages"]
    if system is not None and not _is_text(system):
        raise _bad(path, "system is neither text nor null")
    if not isinstance(messages, list) or len(messages) % 2:
        raise _bad(path, "messages has to be a list of pairs")
    contents = [_content(path, i, message) for i, message in enumerate(messages)]
    return Transcript(system or None, list(zip(contents[::2], contents[1::2], strict=True)))


def _content(path: Path, index: int, message: Any) -> str:
    role = ("user", "model")[index % 2]
    if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] != role:
        raise _bad(path, f"message {index + 1} has to be a role, {role!r}, and a content")
    content = message["content"]
    if not _is_text(content) or not content.strip():
        raise _bad(path, f"the content of message {index + 1} is not text")
    return str(content)


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON escapes can spell lone surrogates, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _bad(path: Path, cause: str) -> BadInput:
    return BadInput(f"{path} is not a saved conversation", cause, "load a file that /save wrote")
