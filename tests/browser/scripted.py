"""A server with the wire format of ours whose answers a test writes, piece by piece.

With a real model no test could say what comes next, nor hold an answer in its middle. `test_server.py` talks to the
real one.
"""

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cabochon.serve import pages


@dataclass(eq=False)
class Answer:
    """What the model says next: pieces, or a refusal. The pieces from `hold` on wait until `release` is called."""

    pieces: Sequence[str] = ("Hello!",)
    hold: int | None = None
    finish: str = "stop"
    breaks_off: bool = False  # the connection ends without [DONE]
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)  # the client is reading it
    gone: threading.Event = field(default_factory=threading.Event)  # the client has left

    def release(self) -> None:
        """Let the held pieces go."""
        self.released.set()

    async def until_released(self) -> None:
        """Wait for it, without a thread."""
        while not self.released.is_set():
            await asyncio.sleep(0.002)


class ScriptedServer:
    """Listens on a port of its own, in a thread of its own."""

    def __init__(self) -> None:
        self.reset()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """As if nobody had asked anything."""
        self.answers: deque[Answer] = deque()
        self.asked: list[dict[str, Any]] = []  # bodies of requests, first to last
        self.context = 8192
        self.names = ["gemma-2-tiny"]
        self.key = ""

    def says(self, *pieces: str, **how: Any) -> Answer:
        """Queue an answer."""
        answer = Answer(pieces, **how)
        self.answers.append(answer)
        return answer

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> Starlette:
        app = Starlette(
            routes=[
                Route("/", pages.page),
                Route("/static/{path:path}", pages.page),
                Route("/v1/models", self._models),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )
        app.state.files = pages.load()
        return app

    def _refused(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "an API key is needed"}}, 401)

    async def _models(self, request: Request) -> Response:
        listed = [{"id": name, "object": "model", "max_model_len": self.context} for name in self.names]
        return self._refused(request) or JSONResponse({"object": "list", "data": listed})

    async def _tokenize(self, request: Request) -> Response:
        count = tokens((await request.json())["messages"])
        return self._refused(request) or JSONResponse({"tokens": [7] * count, "count": count})

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        answer = self.answers.popleft() if self.answers else Answer()
        if answer.status != 200:
            return JSONResponse({"error": {"message": answer.message}}, answer.status, answer.headers)
        return StreamingResponse(events(answer, tokens(body["messages"])), media_type="text/event-stream")


def tokens(messages: Sequence[dict[str, str]]) -> int:
    """A token for each word, and four around each message."""
    return sum(len(message["content"].split()) + 4 for message in messages)


async def events(answer: Answer, prompt_tokens: int) -> AsyncIterator[str]:
    """An answer in the order of OpenAI's chunks: the role, text, why it ended, the usage, [DONE]."""
    answer.begun.set()
    try:
        yield chunk({"role": "assistant", "content": ""})
        for place, piece in enumerate(answer.pieces):
            if place == answer.hold:
                await answer.until_released()
            yield chunk({"content": piece})
        if answer.hold == len(answer.pieces):
            await answer.until_released()
        if answer.breaks_off:
            return
        yield chunk({}, answer.finish)
        spent = {"prompt_tokens": prompt_tokens, "completion_tokens": len(answer.pieces)}
        yield event({"object": "chat.completion.chunk", "choices": [], "usage": spent})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        answer.gone.set()
        raise


def chunk(delta: dict[str, str], finish: str | None = None) -> str:
    """One chunk as an event."""
    return event(
        {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    )


def event(content: dict[str, Any]) -> str:
    """JSON as an event."""
    return f"data: {json.dumps(content)}\n\n"
