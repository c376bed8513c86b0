"""What a relay makes of replicas that break off: here they are a few lines that say what they are told to."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cabochon.serve.errors import ApiError
from cabochon.serve.fleet import Fleet, Replica
from cabochon.serve.relay import make_relay
from cabochon.serve.service import Service
from cabochon.serve.settings import ServeSettings
from servers import CHAT, asks

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null}}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


GOOD = HEAD + chunk(ROLE) + chunk(TOKEN + TOKEN) + chunk(DONE) + b"0\r\n\r\n"
WHOLE = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"text":"ok"}'


class Scripted(Fleet):
    """A fleet whose replicas say these bytes and hang up; the first one is asked first."""

    def __init__(self, folder: Path, scripts: list[bytes | None]) -> None:
        self.draining, self.pending, self._proven = False, 0, True
        self.moved = SimpleNamespace(add=lambda: None)
        self._affinity: Any = SimpleNamespace(
            choose=lambda known, loads: min(loads), remember=lambda known, number: None
        )
        self._empty = asyncio.Event()
        self.scripts, self.asked = scripts, list[int]()
        self.replicas = [Replica(i, str(folder / str(i)), ready=True) for i in range(len(scripts))]

    async def listen(self) -> None:
        for replica, script in zip(self.replicas, self.scripts, strict=True):
            if script is not None:  # None: nobody listens
                await asyncio.start_unix_server(self._saying(replica.number, script), replica.socket)

    def _saying(self, number: int, script: bytes) -> Callable[..., Awaitable[None]]:
        async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked.append(number)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(script)
            await writer.drain()
            writer.close()

        return say


def ask(folder: Path, *scripts: bytes | None, path: str = CHAT) -> tuple[httpx.Response, Scripted]:
    async def run() -> tuple[httpx.Response, Scripted]:
        fleet = Scripted(folder, list(scripts))
        await fleet.listen()
        app = make_relay(Service(ServeSettings()), lambda: fleet)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            response = await client.post(path, json=asks("Hi", stream=True))
        assert not fleet.pending and not any(replica.load for replica in fleet.replicas)
        return response, fleet

    return asyncio.run(run())


@pytest.mark.parametrize(
    "broken",
    [None, b"", b"HTTP/1.1 2", b"nonsense\r\n\r\n", HEAD, HEAD + chunk(ROLE), HEAD + chunk(ROLE + ROLE),
     HEAD + chunk(ROLE + TOKEN[:20]), WHOLE[:-3]],
)  # fmt: skip
def test_what_had_not_begun_is_asked_again(tmp_path: Path, broken: bytes | None) -> None:
    response, fleet = ask(tmp_path, broken, GOOD)
    assert response.status_code == 200 and response.content == ROLE + TOKEN + TOKEN + DONE
    assert fleet.asked[-1] == 1 and response.headers["content-type"] == "text/event-stream"


def test_a_stream_that_breaks_off_says_so_behind_whole_events(tmp_path: Path) -> None:
    response, fleet = ask(tmp_path, HEAD + chunk(ROLE + TOKEN) + chunk(TOKEN[:20]), GOOD)
    assert response.content.startswith(ROLE + TOKEN + b'data: {"error":') and response.content.endswith(DONE)
    assert b"replica_lost" in response.content and TOKEN[:20] not in response.content[len(ROLE + TOKEN) :]
    assert fleet.asked == [0]
    response, _ = ask(tmp_path / "..", HEAD + chunk(b'data: {"index":1}\n\n'), path="/generate_stream")
    assert response.content.endswith(b'"error_type":"generation"}\n\n')


def test_when_all_are_lost(tmp_path: Path) -> None:
    response, fleet = ask(tmp_path, b"", None, HEAD)
    assert response.status_code == 503 and response.json()["error"]["code"] == "no_replica"
    assert response.headers["retry-after"] == "1" and fleet.asked == [0, 2]


def test_a_request_does_not_take_every_replica_along(tmp_path: Path) -> None:
    response, fleet = ask(tmp_path, b"", b"", b"", GOOD)
    assert response.status_code == 503 and response.json()["error"]["code"] == "no_replica"
    assert fleet.asked == [0, 1, 2]


def test_answers_pass_as_they_are(tmp_path: Path) -> None:
    response, _ = ask(tmp_path, WHOLE)
    assert response.json() == {"text": "ok"} and response.headers["content-length"] == "13"
    refused = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\ncontent-length: 2\r\n\r\n{}"
    response, fleet = ask(tmp_path / "..", refused, GOOD)
    assert response.status_code == 429 and response.headers["retry-after"] == "3" and fleet.asked == [0]


def test_nothing_is_taken_on_at_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        fleet = Scripted(tmp_path, [GOOD])
        fleet.began(fleet.replicas[0])
        draining = asyncio.create_task(fleet.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="ending"):
            fleet.choose(())
        fleet.ended(fleet.replicas[0])
        assert await draining
        fleet.began(fleet.replicas[0])
        assert not await fleet.drain(0.01)

    asyncio.run(run())
