"""Commands as tasks of Ray, wherever it has room. All machines see the same folders, under the same paths."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cabochon.deploy.ray_connection import check_room

_LOOK_SECONDS = 0.2  # between looks at whether a signal has come
_SAID_SECONDS = 5.0  # for the last words of a command: what it has started may hold the pipe
_LINES = 20  # of what a command says at its end


@dataclass(frozen=True)
class Failed:
    """The command that did not end well: its name, its code (below 0: a signal), and its last lines."""

    name: str
    code: int
    said: Sequence[str]


def carry_out(
    program: str, commands: Mapping[str, Sequence[str]], came: Callable[[], int], *, gpus: float, cpus: float
) -> Failed | None:
    """Carry out commands as tasks, as many at a time as there is room for.

    One whose machine is lost is started again on another. The others are ended by SIGTERM when one fails, or when
    a signal has come here.

    Args:
        program: Python that runs a command, given the process number of its parent and the command's words.
        commands: the words, by name.
        came: which signal has come; 0: none.
        gpus: of each of them.
        cpus: of each of them, where it has no GPU.

    Call it where Ray is `connected`. Raises `MissingResource` when that has no room for a single one.
    """
    check_room(gpus, cpus)
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": cpus}
    task, place = ray.remote(**options, max_retries=-1)(_run), str(Path.cwd())
    waiting = {task.remote(program, list(words), place): name for name, words in commands.items()}
    try:
        while waiting and not came():
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_SECONDS)
            for one in ready:
                name, (code, said) = waiting.pop(one), ray.get(one)
                if code:
                    return Failed(name, code, said)
        return None
    finally:
        for one in waiting:
            ray.cancel(one)  # an interrupt there: the command saves and ends before its task does
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting))


def _run(program: str, words: Sequence[str], place: str) -> tuple[int, list[str]]:
    """The task: a command in a folder; its code, and its last lines."""
    command = [sys.executable, "-c", program, str(os.getpid()), *words]
    process = subprocess.Popen(command, cwd=place, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: deque[str] = deque(maxlen=_LINES)
    listener = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
    listener.start()
    try:
        while process.poll() is None:  # not `wait`: Ray's interrupt only comes between two steps of Python
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.wait()
        listener.join(_SAID_SECONDS)
    return process.returncode, list(said)
