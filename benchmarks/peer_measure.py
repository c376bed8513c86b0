"""What every peer's worker has in common: what it is asked, what it measures, and what it answers.

Standard library only, because it is imported in the environment of every peer.
"""

import json
import random
import re
import resource
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

WARM_PROMPT, WARM_NEW = 8, 4  # tokens; they bring the weights into memory and run what is done once
LOWEST_ID = 200  # ids below are control tokens in published vocabularies


@dataclass(frozen=True)
class Job:
    """What a worker is asked, as JSON in its only argument. Lengths are in tokens."""

    model: str  # a file or a folder
    threads: int
    prompt: int = 512
    new: int = 33
    streams: int = 16  # 0 leaves this part out
    stream_prompt: int = 128
    seed: int = 0
    highest_id: int = 4000
    options: dict[str, str] = field(default_factory=dict)
    logits: str = ""  # write the logits behind a prompt to this file, float32, and measure nothing


@dataclass(frozen=True)
class Span:
    """One answer: seconds from the call to its first and to its last token, and its tokens."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """What a worker answers. Rates are in tokens a second; `streams` is the sum over all streams."""

    prefill: float
    decode: float
    streams: float | None
    load_seconds: float
    peak_bytes: int
    facts: dict[str, str]


class Peer(Protocol):
    """A loaded model. `answer` is greedy, never stops early, and returns one span for each prompt."""

    facts: dict[str, str]

    def answer(self, prompts: list[list[int]], new: int) -> list[Span]: ...

    def logits(self, ids: list[int]) -> Sequence[float]: ...


def work(open_peer: Callable[[Job], Peer]) -> None:
    """The worker's main program. The answer is the last line of its standard output."""
    job = Job(**json.loads(sys.argv[1]))
    if job.logits:
        Path(job.logits).write_bytes(array("f", open_peer(job).logits(prompt_of(job, 0, job.prompt))).tobytes())
        return
    print(json.dumps(asdict(measure(open_peer, job))))


def measure(open_peer: Callable[[Job], Peer], job: Job) -> Result:
    """Load the model, then time one stream and several. Loading ends with the answer to a short prompt."""
    started = time.perf_counter()
    peer = open_peer(job)
    peer.answer([prompt_of(job, 1, WARM_PROMPT)], WARM_NEW)
    load_seconds = time.perf_counter() - started
    (one,) = peer.answer([prompt_of(job, 2, job.prompt)], job.new)
    rate = None
    if job.streams:
        peer.answer([prompt_of(job, 100 + i, WARM_PROMPT) for i in range(job.streams)], WARM_NEW)
        prompts = [prompt_of(job, 200 + i, job.stream_prompt) for i in range(job.streams)]
        rate = summed_rate(peer.answer(prompts, job.new))
    decode = (one.tokens - 1) / (one.last - one.first)
    return Result(job.prompt / one.first, decode, rate, load_seconds, peak_bytes(), peer.facts)


def summed_rate(spans: Sequence[Span]) -> float:
    """Tokens a second of all streams together, from when the last of them has its first token.

    Some engines start streams one after the other. Of those, the tokens before that moment are left out, taken
    as evenly spaced: a little too many, since decoding is slower while other prompts are read.
    """
    start, end = max(s.first for s in spans), max(s.last for s in spans)
    tokens = 0.0
    for span in spans:
        whole = max(span.last - span.first, 1e-9)
        tokens += (span.tokens - 1) * max(0.0, span.last - start) / whole
    return tokens / (end - start)


def prompt_of(job: Job, number: int, length: int) -> list[int]:
    """Random token ids. Each number and seed has its own, so that no memory of earlier prompts helps."""
    draw = random.Random(f"{job.seed} {number}")
    return [draw.randrange(LOWEST_ID, job.highest_id) for _ in range(length)]


def peak_bytes() -> int:
    """The most memory that this process has had resident, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would start from the size of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
