"""Reward functions in a process of their own, so that one that hangs or crashes costs one answer and not the run."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from cabochon.base import errors
from cabochon.train.scoring import Failure, Sample, Score

START_SECONDS = 120  # that importing the user's file may take
_LAST_SECONDS = 5.0  # for the last words of a process that has ended


class FunctionScorer:
    """Scores of one function, named as `load_reward` takes it.

    Args:
        name: of the function.
        seconds: that one answer may take; then the process is ended, and a new one goes on with the next answer.

    Raises as `load_reward`, and `BadInput` when the process does not come up.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.worker: _Worker | None = None
        self._ready()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """A number for each answer, or why there is none."""
        return [self._score(sample) for sample in samples]

    def close(self) -> None:
        """End the process."""
        if self.worker:
            self.worker.end()
            self.worker = None

    def _score(self, sample: Sample) -> Score:
        worker = self._ready()
        said = worker.ask([sample.prompt, sample.completion, dict(sample.row)], self.seconds)
        if said is None:
            ended = worker.process.poll()
            self.close()
            return Failure(f"it took more than {self.seconds:g} s" if ended is None else f"it crashed ({ended})")
        return Failure(said["error"]) if "error" in said else said["value"]

    def _ready(self) -> "_Worker":
        if self.worker is None:
            worker = _Worker(self.name, self.seconds)
            said = worker.next(START_SECONDS)
            if said is None or "error" in said:
                worker.end()
                raise _error(self.name, said)
            self.worker = worker
        return self.worker


class _Worker:
    """The process, and a thread that reads what it says."""

    def __init__(self, name: str, seconds: float) -> None:
        command = [sys.executable, "-P", "-m", "cabochon.train.reward_worker", str(seconds), name]
        # A session of its own: an interrupt at the keyboard is for the run, which needs the rewards until it has saved.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
        )
        self.said: queue.Queue[str] = queue.Queue()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def ask(self, request: list[Any], seconds: float) -> Any:
        """Its answer; None when there is none in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request, default=str) + "\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self.next(seconds)

    def next(self, seconds: float) -> Any:
        """The next thing it says; None when it says nothing in time, or has ended."""
        try:
            line = self.said.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            self.process.wait()
            return None
        return json.loads(line)

    def end(self) -> None:
        """At once, with what it has started: that would hold the pipe that is listened to."""
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group, as it has a session of its own
        self.process.kill()
        self.process.wait()
        self.thread.join(_LAST_SECONDS)
        if self.thread.is_alive():  # what it started has left the group: closing would wait for it, too
            return
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not yet written to it
                    pipe.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put("")


def _error(name: str, said: Any) -> errors.CabochonError:
    if said is None:
        return errors.BadInput(
            f"the reward {name} does not come up", "its process ended, or said nothing", "try the file with python"
        )
    kind = {"UsageError": errors.UsageError, "MissingResource": errors.MissingResource}.get(said["kind"])
    return (kind or errors.BadInput)(*said["error"])
