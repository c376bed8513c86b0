"""The server as an application of Ray Serve: engines on any number of machines, behind one address.

    serve run cabochon.deploy.ray_app:build model=google/gemma-2-9b-it gpus=1 max_replicas=8

`Front` is what `serve/relay.py` is in one process: it asks who may come in, and asks another engine when one is lost.
Ray starts, watches and scales the engines; which one is asked is decided by `PrefixRouter`, as in `serve/affinity.py`.
"""

import asyncio
import os
from collections import Counter as Tally
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.types import Message

from cabochon.serve.affinity import Affinity
from cabochon.serve.app import make_app
from cabochon.serve.bridge import Bridge
from cabochon.serve.exchange import Headers, Lost
from cabochon.serve.metrics import Counter
from cabochon.serve.relay import make_relay
from cabochon.serve.replica import Plan, load_replica
from cabochon.serve.service import Service
from cabochon.serve.settings import ServeSettings, key_hash


class RayConfig(BaseModel):
    """What `build` is told: `name=value` behind `serve run`, or `args` in a configuration file of Ray.

    Attributes:
        model, weights: as in `cabochon serve`.
        gpus, cpus: of each engine.
        min_replicas, max_replicas: engines; Ray adds some while more than half of `max_running` are busy in each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    model_name: str = "cabochon"
    weights: str = "auto"
    gpus: float = 0
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 4
    max_running: int = 64
    max_waiting: int = 512
    cache_gib: float | None = None


def build(config: RayConfig) -> serve.Application:
    """The application. The variable CABOCHON_API_KEY holds a key that requests then need."""
    key = os.environ.get("CABOCHON_API_KEY", "").strip()
    settings = ServeSettings(
        host="0.0.0.0",
        names=(config.model_name,),
        key_hashes=frozenset({key_hash(key)} if key else ()),
        max_waiting=config.max_waiting,
    )
    cache = None if config.cache_gib is None else int(config.cache_gib * 2**30)
    plan = Plan({"model": config.model, "weights": config.weights}, settings, 1, config.max_running, cache)
    engine = serve.deployment(
        Engine,
        max_ongoing_requests=config.max_running + config.max_waiting,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=max(1, config.max_running // 2),
        ),
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )

    def application() -> Starlette:  # made where it is to run
        return make_relay(Service(settings), lambda: serve.get_replica_context().servable_object.engines)

    front = serve.deployment(serve.ingress(application)(Front), max_ongoing_requests=2048)
    return front.bind(engine.bind(plan))


class Front:
    """What is asked from outside."""

    def __init__(self, engines: Any) -> None:
        self.engines = Engines(engines)


class Engines:
    """The engines, as `relay.py` asks them: which one is Ray's choice."""

    def __init__(self, handle: Any) -> None:
        self._ask = handle.options(stream=True).answer
        self.moved = Counter("Requests that went to another replica because theirs was lost.")

    def choose(self, beginnings: Sequence[bytes], without: Collection[int] = ()) -> "Attempt":
        """Another try."""
        return Attempt(self._ask, len(without), beginnings)

    def began(self, engine: Any) -> None:
        """Ray counts."""

    def ended(self, engine: Any) -> None:
        """Ray counts."""

    async def figures(self) -> dict[int, str]:
        """Ray has figures of its own."""
        return {}


class Attempt:
    """One try to have a request answered."""

    def __init__(self, ask: Any, number: int, known: Sequence[bytes]) -> None:
        self._ask, self.number, self._known = ask, number, known

    @asynccontextmanager
    async def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> AsyncIterator["RayReply"]:
        """As `exchange`."""
        parts = self._ask.remote(self._known, method, target, [*headers, (b"host", b"replica")], body)
        reply = RayReply(parts)
        try:
            await reply.begin()
            yield reply
        finally:
            parts.cancel()  # without effect where it has ended


class RayReply:
    """An answer as it comes through Ray."""

    def __init__(self, parts: Any) -> None:
        self.status, self.headers = 0, list[tuple[bytes, bytes]]()
        self._parts = self._read(parts)

    async def begin(self) -> None:
        """Until the head is here. Raises `Lost`."""
        self.status, self.headers = await anext(self._parts)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._parts

    async def whole(self) -> bytes:
        """All of the body."""
        return b"".join([part async for part in self._parts])

    async def _read(self, parts: Any) -> AsyncIterator[Any]:
        try:
            async for part in parts:
                yield part
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Lost(str(error)) from None


class Engine:
    """An engine with the server around it, in a process that Ray looks after."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Ray awaits it
        lm = await asyncio.to_thread(load_replica, plan, 0)
        _ = lm.text_tokenizer, lm.engine, lm.grammars
        settings = plan.inner
        self._service = Service(settings)
        self._service.bridge = self._bridge = Bridge(
            lm, self._service.metrics, max_waiting=settings.max_waiting, deadline=settings.deadline_seconds
        )
        self._app = make_app(self._service)

    def check_health(self) -> None:
        """Asked by Ray, which starts another process when this raises."""
        if self._bridge.dead:
            raise RuntimeError("the engine has stopped")

    async def answer(
        self, known: Sequence[bytes], method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncIterator[Any]:
        """The head of an answer, (status, headers), then its body. Ray cancels this when nobody waits any more."""
        path, _, query = target.partition(b"?")
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
                 "path": unquote(path.decode("latin-1")), "raw_path": path, "query_string": query, "root_path": "",
                 "headers": headers, "client": None, "server": None}  # fmt: skip
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            await asyncio.Event().wait()  # who asks is gone when this task is cancelled
            raise AssertionError

        task = asyncio.ensure_future(self._app(scope, receive, said.put))
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            while message := await said.get():
                if message["type"] == "http.response.start":
                    yield message["status"], message["headers"]
                elif message.get("body"):
                    yield message["body"]
            await task  # what it raised
        finally:
            task.cancel()


class PrefixRouter(RequestRouter):
    """Ray's router of requests, made to go where a prompt's beginning is known; see `Affinity`."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Ray before the first request."""
        self._affinity, self._loads = Affinity[str](), Tally[str]()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best one, then all others: they are asked in this order whether they have room."""
        if not candidate_replicas:
            return []
        loads = {name: self._loads[name] for name in (r.replica_id.unique_id for r in candidate_replicas)}
        best = self._affinity.choose(_known(pending_request), loads)
        first = [replica for replica in candidate_replicas if replica.replica_id.unique_id == best]
        return [first, [replica for replica in candidate_replicas if replica not in first]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray."""
        self._loads[replica_id.unique_id] += 1
        self._affinity.remember(_known(pending_request), replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray."""
        if replica_id.unique_id in self._loads:
            self._loads[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id.unique_id)
        del self._loads[replica_id.unique_id]


def _known(request: PendingRequest | None) -> list[bytes]:
    return list(request.args[0]) if request is not None and request.args else []
