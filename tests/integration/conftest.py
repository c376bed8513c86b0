"""A live server for programs of others. What they need is in the extra `integration`; `make test-integration`."""

from collections.abc import Iterator

import pytest

import cabochon
from cabochon.lm import LM
from servers import Running, running

QUESTION = "What is 2+3?"


@pytest.fixture(scope="session")
def lm() -> LM:
    return cabochon.load(device="cpu")


@pytest.fixture(scope="module")
def server(lm: LM) -> Iterator[Running]:
    with running(lm) as server:
        yield server


@pytest.fixture
def question() -> str:
    return QUESTION


@pytest.fixture(scope="session")
def expected(lm: LM) -> str:
    return lm.chat([{"role": "user", "content": QUESTION}], max_new_tokens=100).text
