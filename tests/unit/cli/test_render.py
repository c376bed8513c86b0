"""Markdown while it is being written."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cabochon.cli.render import printable, render_stream, split_complete

markdown = st.lists(st.sampled_from(["a", "\n", "\n\n", "```", "```python", "~~~", "- x", "# h", " "])).map("".join)


@given(markdown)
def test_splitting_loses_nothing(text: str) -> None:
    done, rest = split_complete(text)
    assert done + rest == text
    assert done == "" or done.endswith("\n\n") or done.strip() == ""


@given(markdown)
def test_a_code_block_is_never_cut(text: str) -> None:
    done, _ = split_complete(text)
    fence = ""
    for mark in (line.strip()[:3] for line in done.splitlines()):
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
    assert fence == ""


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\ntwo\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n```\ncode\n\nmore", "one\n\n"),
        ("```\ncode\n\nmore\n```\n\nafter", "```\ncode\n\nmore\n```\n\n"),
    ],
)
def test_where_it_splits(text: str, done: str) -> None:
    assert split_complete(text)[0] == done


def rendered(pieces: list[str]) -> str:
    out = io.StringIO()
    render_stream(pieces, Console(file=out, force_terminal=True, width=60, height=10, color_system=None))
    return out.getvalue()


def test_every_paragraph_is_printed_for_good() -> None:
    shown = rendered([f"paragraph {n}\n\n" for n in range(30)] + ["the end"])
    assert all(f"paragraph {n}" in shown for n in range(30))
    assert re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", shown).rstrip().endswith("the end")


def test_what_was_shown_before_an_interruption_stays() -> None:
    def pieces() -> object:
        yield "half an ans"
        raise KeyboardInterrupt

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        render_stream(pieces(), Console(file=out, force_terminal=True, width=60, color_system=None))
    assert "half an ans" in out.getvalue()


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\x9b2J\r\n\tc") == "a\ufffd]0;title\ufffdb\ufffd2J\ufffd\n\tc"
    assert "\x1b]0;" not in rendered(["\x1b]0;title\x07"])
