"""Servers for tests: in a thread of this process, where their state can be looked at, over a real socket."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from cabochon.generate.engine import EngineConfig
from cabochon.lm import LM
from cabochon.serve.bridge import Bridge
from cabochon.serve.server import Server, listen
from cabochon.serve.settings import ServeSettings

MODEL = "cabochon-tiny"
CHAT = "/v1/chat/completions"


class Running:
    """A server that listens at `url`."""

    def __init__(self, load: Callable[[], LM], settings: ServeSettings) -> None:
        self._socket = listen(settings)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(load, settings, self.url)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)

    def _run(self) -> None:
        self.server.run(sockets=[self._socket])

    @property
    def bridge(self) -> Bridge:
        assert self.server.service.bridge
        return self.server.service.bridge

    def client(self, **named: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **named)

    def drain(self) -> None:
        assert self.server._loop
        self.server._loop.call_soon_threadsafe(self.server.drain)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float = 30) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive()


@contextmanager
def running(lm: LM, *, max_running: int = 64, cache_bytes: int | None = None, **settings: Any) -> Iterator[Running]:
    """A server over the weights of `lm`, with an engine of its own."""
    own = LM(lm.model, lm.tokenizer, EngineConfig(max_requests=max_running, cache_bytes=cache_bytes))
    own.__dict__["grammars"] = lm.grammars
    chosen = ServeSettings(**{"port": 0, "names": (MODEL,), **settings})
    server = Running(lambda: own, chosen)
    try:
        wait_until(lambda: server.server.service.bridge is not None)
        yield server
    finally:
        if server.alive:
            server.drain()
        server.join()


def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Until something is true; a test that waits in vain fails."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def asks(text: str, **fields: Any) -> dict[str, Any]:
    """A request to chat."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, each as JSON, the last perhaps as "[DONE]"."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    assert text.endswith("\n\n")
    parts = [part.removeprefix("data: ") for part in text[:-2].split("\n\n")]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]
