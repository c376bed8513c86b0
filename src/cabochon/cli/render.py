"""Markdown that is shown while it is still being written.

A paragraph that is complete is printed for good and scrolls away with the terminal; only the one still being
written is redrawn. So an answer longer than the screen neither flickers nor repeats itself.
"""

import unicodedata
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

FENCES = ("```", "~~~")


def render_stream(pieces: Iterable[str], console: Console) -> None:
    """Shows pieces of markdown as they come. What is complete stays visible if `pieces` raises."""
    text, gap = "", False

    def keep(block: str) -> None:
        nonlocal gap
        if block.strip():
            # Markdown leaves the space between paragraphs to whoever prints more than one.
            console.print(*([""] if gap else []), Markdown(block), sep="\n")
            gap = True

    with Live(console=console, transient=True, refresh_per_second=12, vertical_overflow="crop") as live:
        try:
            for piece in pieces:
                done, text = split_complete(text + printable(piece))
                keep(done)
                live.update(_tail(text, console))
        finally:
            live.update(Text(""))
            keep(text)


def split_complete(text: str) -> tuple[str, str]:
    """(what no later text can change the look of, the rest): cut at the last blank line outside a code block."""
    cut = position = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        mark = line.strip()[:3]
        if mark in FENCES and fence in ("", mark):
            fence = "" if fence else mark
        # An indented block may go on after a blank line; one that begins at the margin ends there.
        elif not fence and line == "\n":
            cut = position
    return text[:cut], text[cut:]


def printable(text: str) -> str:
    """Without control characters: an answer must not be able to steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _tail(text: str, console: Console) -> Markdown | Text:
    """A paragraph as it is so far; of one taller than the screen the plain end, where the new words are."""
    lines, height = text.splitlines(), max(console.height - 2, 1)
    return Markdown(text) if len(lines) <= height else Text("\n".join(lines[-height:]))
