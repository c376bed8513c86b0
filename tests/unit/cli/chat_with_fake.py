"""`cabochon chat` with a fake model: what test_terminal.py runs inside a pseudo-terminal."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeLM, FakeStream

from cabochon.cli import chat
from cabochon.cli.main import main


class EndlessStream(FakeStream):
    def __iter__(self) -> Iterator[str]:
        for n in itertools.count():
            yield f"word{n} "
            time.sleep(0.01)


class EndlessLM(FakeLM):
    def stream(self, prompt: Any, **sampling: Any) -> FakeStream:
        stream = super().stream(prompt, **sampling)
        return EndlessStream([]) if "endless" in prompt[-1]["content"] else stream


if __name__ == "__main__":
    chat.load_lm = lambda *_: EndlessLM()
    sys.exit(main(["chat", *sys.argv[1:]]))
