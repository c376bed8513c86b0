"""What a server is told once, when it starts: where it listens, whom it lets in, and how much it takes on."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server. Every limit holds per request unless it says otherwise; times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    socket: str | None = None  # a path: listen at this Unix socket instead
    names: tuple[str, ...] = ("cabochon",)  # what `model` may be in a request; the first is the one reported
    key_hashes: frozenset[bytes] = frozenset()  # SHA-256 of the API keys; none: everybody is let in
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header; none: those of this machine, when bound to it
    cors_origins: tuple[str, ...] = ()  # pages of other servers that may call this one; "*": all

    max_body: int = 2 * 2**20  # bytes
    max_headers: int = 32 * 2**10  # bytes, names and values and the path together
    max_connections: int = 2048  # in all
    max_waiting: int = 512  # answers in all that wait for a place; beyond them a request is turned away
    max_n: int = 8  # answers to one prompt
    max_prompts: int = 64  # prompts, or texts to embed
    max_new_tokens: int | None = None  # None: what the context leaves
    max_schema_depth: int = 64  # levels of a JSON schema
    header_seconds: float = 10.0  # for a request to say what it wants
    body_seconds: float = 30.0  # for its body to arrive
    idle_seconds: float = 65.0  # for the next request on a connection
    write_seconds: float = 60.0  # for a client that has stopped reading to go on
    deadline_seconds: float = 600.0  # for the whole answer
    drain_seconds: float = 120.0  # for what runs, once the server was told to end

    health_route: str | None = None  # another name of /ready
    predict_route: str | None = None  # where Vertex AI asks, see vertex.py

    strict_roles: bool = False  # refuse conversations that are not user and assistant in turn
    log_json: bool = True
    log_prompts: bool = False


def key_hash(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).digest()
