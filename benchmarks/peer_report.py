"""The machine, the table of medians, and the table of ratios of `peers.py run`."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from peer_measure import Result

GIB = 2**30
# Title of a column, field of a result, what it is divided by, and whether more is better.
COLUMNS = (
    ("prefill tok/s", "prefill", 1.0, True),
    ("decode tok/s", "decode", 1.0, True),
    ("streams tok/s", "streams", 1.0, True),
    ("load s", "load_seconds", 1.0, False),
    ("peak GiB", "peak_bytes", GIB, False),
)

Results = Mapping[str, Sequence[Result]]


def print_report(results: Results, failures: Mapping[str, str], ours: set[str], settings: Mapping[str, int]) -> None:
    """Print everything that a reader needs to judge the figures."""
    print(f"{processor()}, {settings['threads']} threads; medians of {settings['rounds']} rounds, each a new process")
    print(
        f"prompt {settings['prompt']}, {settings['new']} tokens decoded behind it; {settings['streams']} streams "
        f"with prompts of {settings['stream_prompt']}, summed; load: until a short prompt is answered, files in memory"
    )
    print()
    print(f"{'':<24}" + "".join(f"{title:>15}" for title, *_ in COLUMNS))
    for name, rounds in results.items():
        print(f"{name:<24}" + "".join(_cell(middle(rounds, key), unit) for _, key, unit, _ in COLUMNS))
    for name, reason in failures.items():
        print(f"{name:<24}   {reason}")
    for mine in (name for name in results if name in ours):
        _print_ratios(mine, results, ours)
    print()
    for name, rounds in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in rounds[0].facts.items()))


def _print_ratios(mine: str, results: Results, ours: set[str]) -> None:
    print()
    print(f"{mine} / peer; load and peak: less is better")
    for name, rounds in results.items():
        if name in ours:
            continue
        cells = [ratio(middle(results[mine], key), middle(rounds, key)) for _, key, _, _ in COLUMNS]
        print(f"  {name:<22}" + "".join(f"{'-' if r is None else f'{r:.2f} x':>15}" for r in cells))


def middle(rounds: Sequence[Result], key: str) -> float | None:
    """The median of one quantity, or None where a candidate cannot do it."""
    values = [getattr(result, key) for result in rounds]
    return None if None in values else float(median(values))


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, if there are both."""
    return None if a is None or b is None else a / b


def _cell(value: float | None, unit: float) -> str:
    return f"{'-' if value is None else f'{value / unit:,.2f}':>15}"


def processor() -> str:
    """What the machine calls its processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores that this process may run on, counting those that share one core once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for block in _cpuinfo().split("\n\n"):
        fields = dict(re.findall(r"^(processor|physical id|core id)\s*:\s*(\d+)", block, re.MULTILINE))
        if "core id" in fields and int(fields["processor"]) in allowed:
            cores.add((fields.get("physical id"), fields["core id"]))
    return len(cores) or len(allowed)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""
