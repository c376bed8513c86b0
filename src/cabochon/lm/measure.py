"""How fast a model runs on this machine, and how far that is from what the machine could do.

Decoding reads every weight once a step, whoever computes it how: weights in bytes over the measured bandwidth is the
least time that a step can take, and the share of it reached is the figure to look at. Times are the medians of
several rounds.
"""

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cabochon.base.machine import read_bandwidth
from cabochon.generate.engine import Engine, EngineConfig
from cabochon.generate.request import Request
from cabochon.generate.sampling import SamplingParams
from cabochon.model.gemma2 import Gemma2

SHORT = 32  # tokens of the prompts of many streams: what is measured there is decoding


@dataclass(frozen=True)
class Streams:
    """Decoding of several requests side by side."""

    streams: int
    tokens_per_second: float  # summed over the streams
    share_of_bandwidth: float  # least time of a step by memory reads, over the time it took


@dataclass(frozen=True)
class Measured:
    """Rates in tokens per second, times in seconds, sizes in bytes, bandwidth in bytes per second."""

    prompt_tokens: int
    prefill_rate: float
    first_token_seconds: float
    decode: tuple[Streams, ...]
    weights_bytes: int
    peak_memory: int  # of the whole process; on a GPU, of its memory
    bandwidth: float
    threads: int
    gpu: str | None  # its name


def measure(
    model: Gemma2, *, prompt: int = 512, tokens: int = 32, streams: Sequence[int] = (1, 4, 16, 64), rounds: int = 3
) -> Measured:
    """Prefill a prompt, decode behind it, then decode many streams; `tokens` steps each, `rounds` times."""
    bandwidth = read_bandwidth(str(model.device))
    on_gpu = model.device.type == "cuda"
    for count in streams if on_gpu else (1,):  # first calls compile, prove and fault pages in
        _answer(model, count, prompt if on_gpu and count == 1 else SHORT, 2)
    firsts, decoded = [], []
    for _ in range(rounds):
        first, step = _answer(model, 1, prompt, tokens)
        firsts.append(first)
        decoded.append(step)
    first, size = statistics.median(firsts), weights_bytes(model)
    results = []
    for count in streams:
        if count == 1:
            steps, depth = decoded, prompt + tokens // 2
        else:
            steps, depth = [_answer(model, count, SHORT, tokens)[1] for _ in range(rounds)], SHORT + tokens // 2
        step = statistics.median(steps)
        read = size + count * model.config.cache_bytes(depth, model.cache_dtype.itemsize)
        results.append(Streams(count, count / step, read / bandwidth / step))
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else peak_memory()
    gpu = torch.cuda.get_device_name(model.device) if on_gpu else None
    threads = torch.get_num_threads()
    return Measured(prompt, prompt / first, first, tuple(results), size, peak, bandwidth, threads, gpu)


def weights_bytes(model: Gemma2) -> int:
    """Bytes of all parameters and packed weights."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _answer(model: Gemma2, streams: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token of the first stream, and of one step of all streams once every one decodes."""
    # Without stop tokens every answer has its full length, and a new engine remembers no prompt.
    engine = Engine(model, frozenset(), EngineConfig(max_requests=streams, busy_chunk=prompt))
    draw = torch.Generator().manual_seed(streams)
    ids = torch.randint(4, model.config.vocab_size, (streams, prompt), generator=draw).tolist()
    started = time.perf_counter()
    requests = [engine.submit(row, SamplingParams(max_new_tokens=tokens + streams + 1)) for row in ids]
    first = _until(engine, requests[:1], 1) - started
    begun = _until(engine, requests, 2)  # a step of all streams, so that a GPU has its graph
    steps = 0
    while steps < tokens and not any(r.done for r in requests):
        engine.step()
        steps += 1
    return first, (time.perf_counter() - begun) / steps


def _until(engine: Engine, requests: Sequence[Request], tokens: int) -> float:
    """Go on until every request has so many tokens; the time then."""
    while any(len(r.generated) < tokens for r in requests):
        engine.step()
    return time.perf_counter()
