"""`cabochon bench`: how fast a model runs here, and how close that is to what the machine could do."""

import json as json_format
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cabochon.base.errors import UsageError
from cabochon.cli.options import DeviceOptions, HubOptions, Json, Model, load_lm

if TYPE_CHECKING:
    from cabochon.lm.measure import Measured

GIB = 2**30


def bench(
    model: Model = None,
    /,
    *,
    prompt: Annotated[int, Parameter(help="Tokens of the prompt that is prefilled and decoded behind.")] = 512,
    tokens: Annotated[int, Parameter(help="Tokens decoded in each measurement.")] = 32,
    streams: Annotated[
        tuple[int, ...], Parameter(negative="", consume_multiple=True, help="Requests side by side, one figure each.")
    ] = (1, 4, 16, 64),
    rounds: Annotated[int, Parameter(help="Measurements of each; medians are printed.")] = 3,
    json: Json = False,
    hub: HubOptions = HubOptions(),
    device: DeviceOptions = DeviceOptions(),
) -> None:
    """Measure prefill, decoding, loading and memory on this machine.

    The share says how much of the time a step would take if it only read the weights and the cache once, at the
    bandwidth measured just before. Nothing else should run meanwhile.

    Example: cabochon bench

    Example: cabochon init --preset 2b --out random-2b && cabochon bench random-2b
    """
    for name, value in {
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "streams": min(streams, default=0),
    }.items():
        if value < 1:
            raise UsageError(f"--{name} cannot be {value}", "it has to be at least 1", f"change --{name}")
    started = time.perf_counter()
    lm = load_lm(model, hub, device)
    loading = time.perf_counter() - started
    from cabochon.lm.measure import measure

    if prompt + tokens + max(streams) > lm.context_length:
        raise UsageError(
            f"--prompt {prompt} is too long",
            f"with {tokens} tokens behind it, it exceeds the context of {lm.context_length}",
            f"use at most --prompt {max(1, lm.context_length - tokens - max(streams))}",
        )
    measured = measure(lm.model, prompt=prompt, tokens=tokens, streams=streams, rounds=rounds)
    if json:
        print(json_format.dumps({"load_seconds": loading, **asdict(measured)}))
    else:
        _print(model or "the model inside", loading, measured)


def _print(name: str, loading: float, m: "Measured") -> None:
    from rich.console import Console
    from rich.table import Table

    rows: list[tuple[Any, ...]] = [
        ("load", f"{loading:.2f} s", ""),
        (f"prefill {m.prompt_tokens}", f"{m.prefill_rate:,.1f} tokens/s", f"{m.first_token_seconds:.3f} s to a token"),
    ]
    for d in m.decode:
        label = "1 stream" if d.streams == 1 else f"{d.streams} streams"
        rows.append(
            (f"decode, {label}", f"{d.tokens_per_second:,.1f} tokens/s", f"{d.share_of_bandwidth:.0%} of memory")
        )
    rows.append(("weights", f"{m.weights_bytes / GIB:.2f} GiB", ""))
    rows.append(("peak memory", f"{m.peak_memory / GIB:.2f} GiB", "of the GPU" if m.gpu else "of the whole process"))
    rows.append(("bandwidth", f"{m.bandwidth / 1e9:,.0f} GB/s", m.gpu or f"{m.threads} threads"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=name)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
