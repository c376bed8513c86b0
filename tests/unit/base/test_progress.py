"""Progress is for people: on a terminal's standard error and nowhere else."""

import io
import sys

import pytest

from cabochon.base.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("unit", ["steps", "bytes"])
@pytest.mark.parametrize("total", [3, None])
def test_a_terminal_sees_a_bar(monkeypatch: pytest.MonkeyPatch, unit: str, total: int | None) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with track(total, "reading", unit=unit) as advance:
        advance(3)
    assert "reading" in screen.getvalue()


def test_a_pipe_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with track(3, "reading") as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")
