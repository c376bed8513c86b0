"""One of several engines behind `cabochon serve --replicas`: a server at a Unix socket, in a process of its own.

It is told what to do as a line of JSON on its standard input, and ends when that is closed: with whoever started it.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from cabochon.base.errors import CabochonError
from cabochon.base.machine import free_memory
from cabochon.generate.engine import EngineConfig
from cabochon.lm import LM, load
from cabochon.serve.server import serve
from cabochon.serve.settings import ServeSettings


@dataclass(frozen=True)
class Plan:
    """What all replicas of a model have in common.

    Attributes:
        model: arguments of `cabochon.load` that JSON can say.
        cache_bytes: memory for keys and values of each; None: an equal part of half of what is free.
    """

    model: dict[str, Any]
    settings: ServeSettings
    replicas: int
    max_running: int = 64
    cache_bytes: int | None = None

    @property
    def inner(self) -> ServeSettings:
        """The settings of a server that only the one before it can reach: who may come in is asked there."""
        return replace(self.settings, key_hashes=frozenset(), cors_origins=(), allowed_hosts=("replica",))

    def told(self, number: int, socket: str) -> bytes:
        """The line for one replica."""
        settings = asdict(replace(self.inner, socket=socket))
        del settings["key_hashes"]
        plan = {**asdict(replace(self, settings=ServeSettings())), "settings": settings}
        return json.dumps({"plan": plan, "number": number}, default=list).encode() + b"\n"


def place(plan: Plan, number: int) -> tuple[str | None, int]:
    """The device of a replica, and how many share it."""
    import torch

    device, gpus = plan.model.get("device"), torch.cuda.device_count()
    if device in (None, "cuda") and gpus:
        return f"cuda:{number % gpus}", len(range(number % gpus, plan.replicas, gpus))
    return device, plan.replicas


def load_replica(plan: Plan, number: int) -> LM:
    """The model of one replica."""
    device, sharing = place(plan, number)
    lm = load(**{**plan.model, "device": device})
    cache = plan.cache_bytes
    if cache is None:
        cache = free_memory(str(lm.model.device)) // 2 // sharing
    lm.engine_config = EngineConfig(cache_bytes=cache, max_requests=plan.max_running)
    return lm


def main() -> int:
    """Serve, as standard input says. Gives the exit code."""
    told = json.loads(sys.stdin.readline())
    given: dict[str, Any] = told["plan"].pop("settings")
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    plan = Plan(**told["plan"], settings=ServeSettings(**fields))
    threading.Thread(target=_follow, name="cabochon-follow", daemon=True).start()
    try:
        serve(lambda: load_replica(plan, told["number"]), plan.settings)
    except CabochonError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _follow() -> None:
    """End with whoever holds the other end of standard input."""
    while os.read(0, 64):  # not sys.stdin: a thread that waits in it is in the way of a normal end
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
