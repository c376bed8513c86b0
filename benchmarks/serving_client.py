"""Clients for `serving.py`, in a process of their own: raw sockets, so that they cost as little as possible.

    python benchmarks/serving_client.py PORT < PLAN      PLAN: {"bodies": [...], "starts": [seconds, ...]}

Prints JSON: for each request its status, seconds to the answer's head, to the first token and to the end, and its text.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass


@dataclass
class Result:
    """What became of one request."""

    status: int = 0
    head: float = 0.0
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0
    text: str = ""
    whole: bool = False


async def ask(port: int, body: dict[str, object], wait: float) -> tuple[Result, bytes]:
    """One stream, and what came. It is read when all have ended: earlier it would take time from the server."""
    await asyncio.sleep(wait)
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun, result = time.perf_counter(), Result()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    result.status = int((await reader.readline()).split()[1])
    result.head = time.perf_counter() - begun
    received = bytearray()
    while part := await reader.read(65536):
        if not result.first and b'"delta":{"content"' in part:
            result.first = time.perf_counter() - begun
        received += part
    result.end = time.perf_counter() - begun
    writer.close()
    return result, bytes(received)


def read(result: Result, body: bytes) -> Result:
    """What the events say."""
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    result.whole = bool(events) and events.pop() == b"[DONE]"
    for event in map(json.loads, events):
        result.text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        result.tokens += (event.get("usage") or {"completion_tokens": 0})["completion_tokens"]
    return result


async def main(port: int) -> None:
    """All requests of the plan, each at its time."""
    plan = json.load(sys.stdin)
    asked = [ask(port, body, wait) for body, wait in zip(plan["bodies"], plan["starts"], strict=True)]
    begun = time.perf_counter()
    streams = await asyncio.gather(*asked)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "results": [asdict(read(*stream)) for stream in streams]}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
