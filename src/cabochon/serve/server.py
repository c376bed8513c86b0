"""The process: it listens at once, loads the model meanwhile, and ends when everything under way has been answered."""

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from cabochon.base.errors import CabochonError, MissingResource
from cabochon.lm import LM
from cabochon.serve.app import make_app
from cabochon.serve.bridge import Bridge
from cabochon.serve.guard import write_log
from cabochon.serve.protocol import protocol_for
from cabochon.serve.service import Service
from cabochon.serve.settings import ServeSettings

LOG = logging.getLogger("cabochon.serve")


def serve(load: Callable[[], LM], settings: ServeSettings, started: Callable[[str], None] | None = None) -> None:
    """Serve until a signal says otherwise.

    Args:
        load: makes the model; runs on a thread while the server says 503.
        started: is told the address, once it is listened at.

    Raises:
        MissingResource: the address cannot be listened at.
        CabochonError: whatever `load` raises.
    """
    run(lambda address: Server(load, settings, address), settings, started)


def run(make: Callable[[str], "Server"], settings: ServeSettings, started: Callable[[str], None] | None = None) -> None:
    """Run the server that `make` makes for an address until it ends. Otherwise as `serve`."""
    _quiet()
    with closing(listen(settings)) as listener:
        address = settings.socket or address_of(listener)
        server = make(address)
        if started:
            started(address)
        server.run(sockets=[listener])
    if server.failure:
        raise server.failure


def address_of(listener: socket.socket) -> str:
    """What a browser calls a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the server's address."""
    try:
        if settings.socket:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(settings.socket)
            listener.listen(2048)
            return listener
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise MissingResource(
            f"nothing can listen at {settings.socket or f'{settings.host}:{settings.port}'}",
            error.strerror or str(error),
            "choose another --port, or end what listens there",
        ) from None


class UnderWay(Protocol):
    """Answers that are being worked on."""

    pending: int
    draining: bool

    async def drain(self, seconds: float) -> bool:
        """Take nothing more on and wait for what runs; whether all of it ended in time."""


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM goes on until nothing is under way. A second signal ends it at once."""

    def __init__(self, load: Callable[[], LM] | None, settings: ServeSettings, address: str) -> None:
        self.settings, self.service, self.address = settings, Service(settings), address
        self.failure: BaseException | None = None
        self._load, self._draining = load, False
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            self.application(),
            http=protocol_for(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(settings.idle_seconds),
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    def application(self) -> Starlette:
        """What answers requests."""
        return make_app(self.service)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.begin(self._loop)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make ready for answers, without waiting for it."""
        threading.Thread(target=self._fetch, args=(loop,), name="cabochon-load", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End."""
        await super().shutdown(sockets)
        if self.service.bridge:
            self.service.bridge.close()
        write_log(self.settings, "ended", {})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        if self._loop is None or self._draining:
            self.should_exit = self.force_exit = True
        else:
            self._draining = True
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take nothing on any more and end when nothing is under way."""
        write_log(self.settings, "draining", {"under_way": self.under_way.pending if self.under_way else 0})
        self._draining = True
        if self.under_way:
            self.under_way.draining = True
        self._task = asyncio.get_running_loop().create_task(self._drain())

    @property
    def under_way(self) -> "UnderWay | None":
        """What has to end before the server does."""
        return self.service.bridge

    async def _drain(self) -> None:
        waited = self.under_way
        if waited and not await waited.drain(self.settings.drain_seconds):
            LOG.error("%d answers were cut off after %g seconds", waited.pending, self.settings.drain_seconds)
        self.should_exit = True

    def _fetch(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._load
        try:
            lm = self._load()
            _ = lm.text_tokenizer, lm.engine, lm.grammars  # what the first request would wait for
            gc.collect()
            gc.freeze()  # what is there now stays: looking through it again would stop all answers for 0.1 s
        except BaseException as error:
            loop.call_soon_threadsafe(self.failed, error)
        else:
            loop.call_soon_threadsafe(self._loaded, lm)

    def _loaded(self, lm: LM) -> None:
        settings = self.settings
        bridge = Bridge(lm, self.service.metrics, max_waiting=settings.max_waiting, deadline=settings.deadline_seconds)
        bridge.draining = self._draining
        self.service.bridge = bridge
        write_log(settings, "ready", {"address": self.address, "models": list(settings.names)})

    def failed(self, error: BaseException) -> None:
        """The server cannot do what it is for: it ends, and `run` raises this."""
        if not isinstance(error, CabochonError):
            LOG.error("the model cannot be loaded", exc_info=error)
        self.failure, self.should_exit = error, True


def _quiet() -> None:
    """Warnings and errors of the libraries go to standard error, and nothing else of theirs."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN) if hasattr(signal, "SIGPIPE") else None
