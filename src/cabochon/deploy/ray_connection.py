"""A Ray to work on: the one that RAY_ADDRESS names, or a local one."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError, RayTaskError

from cabochon.base.errors import MissingResource


@contextmanager
def connected() -> Iterator[None]:
    """Ray, left as it was found. Its start takes the signals' handlers.

    Raises `MissingResource` when it is not there, or gives up.
    """
    found = ray.is_initialized()
    try:
        if not found:
            _check_address()
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        yield
    except RayTaskError:
        raise  # a bug of ours
    except (RayError, OSError) as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "look at RAY_ADDRESS (local: a new Ray here) and at Ray's own logs, then give the same command again"
        raise MissingResource("Ray has failed", cause, hint) from None
    finally:
        if not found:
            ray.shutdown()


def check_room(gpus: float, cpus: float) -> None:
    """Raise `MissingResource` when no machine has so much of what one worker needs.

    On machines that do not become more, Ray would wait for ever for room that none of them has.
    """
    if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return
    name, flag, asked = ("GPU", "--ray-gpus", gpus) if gpus else ("CPU", "--ray-cpus", cpus)
    most = max((node["Resources"].get(name, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if asked > most:
        hint = f"give a smaller {flag}, or RAY_ADDRESS of a larger Ray"
        raise MissingResource("Ray has no room for this", f"there are {most:g} {name}s", hint)


def _check_address() -> None:
    """Ray would ask an address where nobody listens for minutes."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
