"""Several engines, each in a process of its own: started, watched, and started again when they end."""

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from cabochon.base.errors import CabochonError, Elsewhere
from cabochon.base.machine import usable_cores
from cabochon.serve.affinity import Affinity
from cabochon.serve.errors import unavailable
from cabochon.serve.exchange import Answer, Headers, Lost, exchange
from cabochon.serve.guard import write_log
from cabochon.serve.metrics import Counter, Gauge, Metrics
from cabochon.serve.replica import Plan

LOG = logging.getLogger("cabochon.serve")
_LOOK = 0.05  # seconds between two looks at whether a process is alive
_ASK = 2.0  # seconds between two questions whether a replica is well
_SILENCE = 60.0  # seconds without an answer after which it is ended
_MOST_WAIT = 30.0  # seconds before one that keeps ending is started again


@dataclass(eq=False)
class Replica:
    """One engine."""

    number: int
    socket: str
    process: "subprocess.Popen[bytes] | None" = None
    ready: bool = False
    load: int = 0  # requests under way

    def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> AbstractAsyncContextManager[Answer]:
        """As `exchange`."""
        return exchange(self.socket, method, target, headers, body)


class Fleet:
    """The replicas of a plan. Made and used on the event loop.

    Args:
        failed: is called when a replica ends before any was ready, with the error that it has printed.
    """

    def __init__(self, plan: Plan, metrics: Metrics, failed: Callable[[CabochonError], None]) -> None:
        self.plan, self.draining, self.pending = plan, False, 0
        self.lost = Counter("Replicas that have ended and were started again.")
        self.moved = Counter("Requests that went to another replica because theirs was lost.")
        self._failed, self._proven, self._closing = failed, False, False
        self._folder = tempfile.mkdtemp(prefix="cabochon-")  # for this user alone, as are the sockets in it
        self.replicas = [Replica(i, str(Path(self._folder, f"{i}.sock"))) for i in range(plan.replicas)]
        self._affinity, self._empty = Affinity[int](), asyncio.Event()
        self._tasks = [asyncio.get_running_loop().create_task(self._keep(replica)) for replica in self.replicas]
        metrics.gauges |= {
            "replicas_ready": Gauge("Replicas that answer.", lambda: sum(r.ready for r in self.replicas)),
        }
        metrics.counters |= {"replicas_lost_total": self.lost, "requests_moved_total": self.moved}

    def choose(self, beginnings: Sequence[bytes], without: Collection[int] = ()) -> Replica:
        """A replica for a request. Raises `ApiError` (503) when none is there."""
        if self.draining:
            raise unavailable("the server is ending", "draining")
        loads = {r.number: r.load for r in self.replicas if r.ready and r.number not in without}
        if not loads:
            raise unavailable("no replica is ready", "loading" if not self._proven else "no_replica", after=1)
        number = self._affinity.choose(beginnings, loads)
        self._affinity.remember(beginnings, number)
        return self.replicas[number]

    def began(self, replica: Replica) -> None:
        """A request is on its way to a replica."""
        replica.load += 1
        self.pending += 1

    def ended(self, replica: Replica) -> None:
        """It is over."""
        replica.load -= 1
        self.pending -= 1
        if not self.pending:
            self._empty.set()

    async def figures(self) -> dict[int, str]:
        """What /metrics of the replicas says."""
        found = {}
        for replica in [replica for replica in self.replicas if replica.ready]:
            try:
                async with exchange(replica.socket, "GET", b"/metrics") as answer:
                    found[replica.number] = (await answer.whole()).decode()
            except Lost:
                continue
        return found

    async def drain(self, seconds: float) -> bool:
        """Take nothing more on and wait for what runs; whether all of it ended in time."""
        self.draining = True
        self._empty.clear()
        if self.pending:
            try:
                await asyncio.wait_for(self._empty.wait(), seconds)
            except TimeoutError:
                return False
        return True

    async def close(self) -> None:
        """End the processes. What they are answering is lost."""
        self._closing = True
        for replica in self.replicas:
            if replica.process:
                replica.process.terminate()
        await asyncio.wait(self._tasks, timeout=5)
        for replica in self.replicas:
            if replica.process and replica.process.poll() is None:
                replica.process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # One replica

    async def _keep(self, replica: Replica) -> None:
        wait, loop = 0.0, asyncio.get_running_loop()
        while not self._closing:
            began = loop.time()
            try:
                replica.process = self._start(replica)
                code = await self._watch(replica, replica.process)
            except OSError:  # no process, or one that ended before it was told what to do: as one that ended at once
                LOG.exception("a replica did not start")
                code = 1
            replica.ready = False
            self._affinity.forget(replica.number)
            if self._closing:
                return
            if not self._proven:
                self._failed(Elsewhere(code if code > 0 else 1))
                return
            self.lost.add()
            write_log(self.plan.settings, "replica_lost", {"replica": replica.number, "code": code})
            wait = 0.0 if loop.time() - began > _MOST_WAIT else min(_MOST_WAIT, 2 * wait + 1)
            await asyncio.sleep(wait)

    def _start(self, replica: Replica) -> "subprocess.Popen[bytes]":
        Path(replica.socket).unlink(missing_ok=True)
        threads = str(max(1, usable_cores() // len(self.replicas)))
        process = subprocess.Popen(
            [sys.executable, "-m", "cabochon.serve.replica"],
            stdin=subprocess.PIPE,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        assert process.stdin
        process.stdin.write(self.plan.told(replica.number, replica.socket))
        process.stdin.flush()  # it stays open: the replica ends with it
        return process

    async def _watch(self, replica: Replica, process: "subprocess.Popen[bytes]") -> int:
        """Until the process ends; its exit code. One that says nothing for long, or cannot go on, is ended."""
        loop = asyncio.get_running_loop()
        asked = answered = loop.time()
        while process.poll() is None:
            await asyncio.sleep(_LOOK)
            if loop.time() - asked < (_ASK if replica.ready else _LOOK):
                continue
            asked = loop.time()
            status, code = await self._ask(replica)
            answered = loop.time() if status else answered
            if loop.time() - answered > _SILENCE or code == "engine_dead":
                process.kill()
            ready = status == 200
            if ready and not replica.ready:
                write_log(self.plan.settings, "replica_ready", {"replica": replica.number, "process": process.pid})
            replica.ready = ready if status else replica.ready
            self._proven = self._proven or ready
        return process.returncode

    async def _ask(self, replica: Replica) -> tuple[int, str | None]:
        """The status of /ready, and why it is not 200; 0 when there is no answer."""
        try:
            async with asyncio.timeout(_ASK), exchange(replica.socket, "GET", b"/ready") as answer:
                body = await answer.whole()
                return answer.status, "engine_dead" if b'"engine_dead"' in body else None
        except (Lost, TimeoutError):
            return 0, None
