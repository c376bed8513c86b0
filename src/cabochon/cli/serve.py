"""`cabochon serve`: a model behind HTTP, with a chat page."""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import DeviceOptions, HubOptions, Model, load_arguments

if TYPE_CHECKING:
    from cabochon.serve.settings import ServeSettings


@Parameter(name="*", group="Who may come in")
@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Where the server listens, and to whom."""

    host: Annotated[str, Parameter(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="0: any that is free.")] = 8000
    api_keys: Annotated[
        Path | None,
        Parameter(help="File with an API key on each line. CABOCHON_API_KEY in the environment holds a single one."),
    ] = None
    allowed_host: Annotated[
        tuple[str, ...], Parameter(negative="", help="Name under which it may be called. Can be repeated.")
    ] = ()
    cors_origin: Annotated[
        tuple[str, ...], Parameter(negative="", help="Page of another server that may call it; *: all of them.")
    ] = ()
    health_route: Annotated[str | None, Parameter(help="Another path that answers as /ready does.")] = None
    predict_route: Annotated[
        str | None, Parameter(help="Path at which Vertex AI asks: instances in, predictions out.")
    ] = None


@Parameter(name="*", group="How much it takes on")
@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits, per request where nothing else is said."""

    max_running: Annotated[int, Parameter(help="Answers computed side by side.")] = 64
    max_waiting: Annotated[int, Parameter(help="Answers that may wait; with more, requests get 429.")] = 512
    cache_gib: Annotated[
        float | None, Parameter(help="Memory for keys and values; left out: half of what is free.")
    ] = None
    max_new_tokens: Annotated[int | None, Parameter(help="Longest answer; left out: what the context leaves.")] = None
    max_n: Annotated[int, Parameter(help="Answers to one prompt.")] = 8
    max_prompts: Annotated[int, Parameter(help="Prompts, or texts to embed.")] = 64
    max_body: Annotated[int, Parameter(help="Bytes of a body.")] = 2 * 2**20
    max_headers: Annotated[int, Parameter(help="Bytes of headers.")] = 32 * 2**10
    max_connections: Annotated[int, Parameter(help="Connections at a time.")] = 2048
    max_schema_depth: Annotated[int, Parameter(help="Levels of a JSON schema.")] = 64
    header_seconds: Annotated[float, Parameter(help="For the headers to arrive.")] = 10.0
    body_seconds: Annotated[float, Parameter(help="For the body to arrive.")] = 30.0
    idle_seconds: Annotated[float, Parameter(help="A connection is kept without a request.")] = 65.0
    write_seconds: Annotated[float, Parameter(help="A client may not read its answer.")] = 60.0
    deadline_seconds: Annotated[float, Parameter(help="For the whole answer.")] = 600.0
    drain_seconds: Annotated[float, Parameter(help="For what runs to end, after SIGTERM.")] = 120.0


def serve(
    model: Model = None,
    /,
    *,
    model_name: Annotated[
        tuple[str, ...], Parameter(negative="", help="What requests call the model. Can be repeated.")
    ] = (),
    strict_roles: Annotated[
        bool, Parameter(negative="", help="Refuse conversations that Gemma 2 was not trained on, such as system roles.")
    ] = False,
    log_text: Annotated[bool, Parameter(negative="", help="Log lines for people instead of JSON.")] = False,
    log_prompts: Annotated[bool, Parameter(negative="", help="Log what was asked, too.")] = False,
    replicas: Annotated[
        int, Parameter(help="Engines, each in a process of its own: one for each GPU, or for each group of cores.")
    ] = 1,
    access: AccessOptions = AccessOptions(),
    limits: LimitOptions = LimitOptions(),
    hub: HubOptions = HubOptions(),
    device: DeviceOptions = DeviceOptions(),
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page to chat with it.

    Ends on SIGTERM or Ctrl-C when everything under way has been answered; a second one ends it at once.

    Example: cabochon serve

    Example: cabochon serve google/gemma-2-9b-it --host 0.0.0.0 --api-keys keys.txt
    """
    if replicas < 1:
        raise UsageError(f"--replicas cannot be {replicas}", "it has to be above 0", "change --replicas")
    settings = _settings(model, model_name, strict_roles, log_text, log_prompts, access, limits)
    from cabochon.serve.relay import serve_fleet
    from cabochon.serve.replica import Plan, load_replica
    from cabochon.serve.server import serve as run

    cache = None if limits.cache_gib is None else int(limits.cache_gib * 2**30)
    plan = Plan(load_arguments(model, hub, device), settings, replicas, limits.max_running, cache)

    def started(address: str) -> None:
        print(f"listening at {address}", file=sys.stderr, flush=True)

    if replicas > 1:
        serve_fleet(plan, started)
    else:
        run(lambda: load_replica(plan, 0), settings, started)


def _settings(
    model: str | None,
    names: tuple[str, ...],
    strict_roles: bool,
    log_text: bool,
    log_prompts: bool,
    access: AccessOptions,
    limits: LimitOptions,
) -> "ServeSettings":
    """Raises `UsageError` for a limit that is not above 0, and for keys that cannot be read."""
    from cabochon.serve.settings import ServeSettings, key_hash

    chosen = asdict(limits)
    for name, value in chosen.items():
        if value is not None and value <= 0 and name != "max_waiting":
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} cannot be {value}", "it has to be above 0", f"change {flag}")
    del chosen["max_running"], chosen["cache_gib"]
    if not 0 <= access.port < 2**16:
        raise UsageError(f"--port cannot be {access.port}", "ports end at 65535", "choose one above 1023")
    keys = _keys(access.api_keys)
    if not keys and access.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: whoever reaches {access.host} can use this server; --api-keys lets in only some", file=sys.stderr)
    return ServeSettings(
        host=access.host,
        port=access.port,
        names=names or (_name(model),),
        key_hashes=frozenset(map(key_hash, keys)),
        allowed_hosts=tuple(host.lower() for host in access.allowed_host),
        cors_origins=access.cors_origin,
        health_route=_route(access.health_route, "--health-route"),
        predict_route=_route(access.predict_route, "--predict-route"),
        strict_roles=strict_roles,
        log_json=not log_text,
        log_prompts=log_prompts,
        **chosen,
    )


def _route(path: str | None, flag: str) -> str | None:
    if path is not None and (not path.startswith("/") or set(path) & set("{}?# ")):
        raise UsageError(f"{flag} cannot be {path!r}", "it is no path", f"{flag} /predict")
    return path


def _name(model: str | None) -> str:
    """What a model is called where nothing is said: a Hub id as it is, a folder by its last part."""
    if model is None:
        return "cabochon-tiny"
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _keys(file: Path | None) -> list[str]:
    single = os.environ.get("CABOCHON_API_KEY", "").strip()
    keys = [single] if single else []
    if file is None:
        return keys
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"the keys in {file} cannot be read", cause, "check the path behind --api-keys") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise UsageError(f"there are no keys in {file}", "every line is empty", "write one on each line")
    return keys + found
