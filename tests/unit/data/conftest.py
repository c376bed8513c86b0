"""A small tokenizer, and files with rows."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cabochon.text.tokenizer import Tokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from stream_checks import Writer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(__file__).parents[2] / "golden" / "text")


@pytest.fixture
def jsonl(tmp_path: Path) -> Writer:
    """Writes rows under a name: texts as they are, anything else as JSON."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
