"""The process in which a reward function runs: `python -m cabochon.train.reward_worker SECONDS REWARD`.

It reads a line of JSON for each answer, [prompt, completion, row], and writes {"value": 1.0} or {"error": "why not"}.
Its first line says whether the reward could be loaded. What the function prints goes to standard error.
"""

import json
import os
import reprlib
import signal
import sys
from collections.abc import Sequence
from typing import IO, Any

from cabochon.base.errors import CabochonError
from cabochon.train.rewards import Reward, load_reward


def main(arguments: Sequence[str]) -> None:
    """Answer until standard input ends."""
    seconds, name = arguments
    asked, out = _taken(0, "r"), _taken(1, "w")
    try:
        reward = load_reward(name)
    except CabochonError as error:
        _say(out, {"kind": type(error).__name__, "error": [error.what, error.cause, error.hint]})
        return
    _say(out, {"ready": True})
    for line in asked:
        _say(out, _answer(reward, json.loads(line), float(seconds)))


def _taken(descriptor: int, mode: str) -> IO[str]:
    """Standard input or output for us alone: the function gets nothing to read, and prints to standard error."""
    ours = os.fdopen(os.dup(descriptor), mode, encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY) if descriptor == 0 else 2, descriptor)
    return ours


def _answer(reward: Reward, request: Any, seconds: float) -> dict[str, Any]:
    if hasattr(signal, "alarm"):  # the end of a function that hangs, also when nobody is left to end it
        signal.alarm(int(seconds) + 5)
    try:
        value = reward(*request)
        try:
            return {"value": float(value)}
        except (TypeError, ValueError):
            return {"error": f"it gave {reprlib.repr(value)}, which is no number"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _say(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
