"""Helpers of this folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cabochon
from cabochon.lm import LM

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def lm() -> Iterator[LM]:
    yield cabochon.load(device="cpu")
