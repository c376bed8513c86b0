"""The chat in a real (pseudo-)terminal: keys go in, a screen comes out."""

import json
import os
import re
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

PROMPT, DONE = "you", "tokens/s"
LIMIT = 60.0  # seconds until a text counts as missing; reached only by a failure


class Terminal:
    """A process behind a pseudo-terminal."""

    def __init__(self, script: Path, state: Path) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            source = str(Path(__file__).parents[3] / "src")
            paths = {"XDG_STATE_HOME": str(state), "PYTHONPATH": source}
            env = {**os.environ, **paths, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
            os.execve(sys.executable, [sys.executable, str(script)], env)

    def expect(self, text: str) -> str:
        """Waits for a text; gives what came since the last one, without colors and cursor movements."""
        end = time.monotonic() + LIMIT
        while text not in plain(self.seen):
            assert time.monotonic() < end, f"{text!r} did not come, but {plain(self.seen)!r}"
            if not self._read():
                break
        shown, self.seen = plain(self.seen), ""
        assert text in shown
        return shown

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        while self._read():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def _read(self) -> bool:
        """Whether the process may still write."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            raw = os.read(self.fd, 65536)
        except OSError:  # how Linux reports that the other side closed
            return False
        self.seen += raw.decode(errors="replace")
        if b"\x1b[6n" in raw:  # "where is the cursor?": a terminal answers
            os.write(self.fd, b"\x1b[1;1R")
        return bool(raw)


def plain(screen: str) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", screen)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    started = Terminal(Path(__file__).with_name("chat_with_fake.py"), tmp_path / "state")
    yield started
    if started.pid:
        os.kill(started.pid, signal.SIGKILL)
        os.waitpid(started.pid, 0)
    os.close(started.fd)


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.expect(PROMPT)
    terminal.type("hello **there**\r")
    assert "echo hello there" in terminal.expect(DONE)  # markdown is shown, not spelled out
    terminal.expect(PROMPT)
    terminal.type("first\\\rsecond\x1b\rthird\r")
    terminal.expect(DONE)
    terminal.expect(PROMPT)
    terminal.type(f"/save {tmp_path / 'chat.json'}\r")
    terminal.expect("Saved 2 turns")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert messages[2]["content"] == "first\nsecond\nthird"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    terminal.type("endless\r")
    terminal.expect("word3")
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect(PROMPT)
    terminal.type("still there?\r")
    assert "echo still there?" in terminal.expect(DONE)
    terminal.expect(PROMPT)
    terminal.type("\x03")
    terminal.expect("/quit leaves")
    terminal.expect(PROMPT)
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0


def test_an_error_does_not_end_the_chat(terminal: Terminal) -> None:
    terminal.expect(PROMPT)
    terminal.type("/rest\r")
    terminal.expect("did you mean /reset?")
    terminal.expect(PROMPT)
    terminal.type("word " * 150 + "\r")
    terminal.expect("the message is too long")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_history_is_kept_for_its_owner_alone(terminal: Terminal, tmp_path: Path) -> None:
    terminal.expect(PROMPT)
    terminal.type("remember me\r")
    terminal.expect(DONE)
    terminal.expect(PROMPT)
    terminal.type("\x04")
    terminal.exit_code()
    history = tmp_path / "state" / "cabochon" / "history"
    assert "remember me" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
