"""One model for all tests of the server, and a server with everyday settings."""

from collections.abc import Iterator

import httpx
import pytest

import cabochon
from cabochon.lm import LM
from servers import Running, running


@pytest.fixture(scope="session")
def lm() -> LM:
    return cabochon.load(device="cpu")


@pytest.fixture(scope="module")
def server(lm: LM) -> Iterator[Running]:
    with running(lm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
