"""The command line with a fake model behind it."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeLM

from cabochon.cli.main import main


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> FakeLM:
    """Every command gets this model."""
    fake = FakeLM()
    for module in ("chat", "run"):
        monkeypatch.setattr(f"cabochon.cli.{module}.load_lm", lambda *_: fake)
    return fake


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `cabochon ARGUMENTS` in this process, with bytes on standard input."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        pipe = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", pipe)
        code = main(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
