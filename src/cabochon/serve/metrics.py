"""Figures for Prometheus (text format 0.0.4): counters and histograms kept here, gauges read when asked for."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0)

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A number that only grows, one for each set of labels."""

    help: str
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self, name: str) -> list[str]:
        rows = self.values or {(): 0.0}
        return [*_head(name, self.help, "counter"), *(f"{name}{_labels(k)} {v:.12g}" for k, v in rows.items())]


@dataclass
class Gauge:
    """A number that is looked up."""

    help: str
    read: Callable[[], float]

    def lines(self, name: str) -> list[str]:
        return [*_head(name, self.help, "gauge"), f"{name} {self.read():.12g}"]


class Histogram:
    """How many observations were at most so large."""

    def __init__(self, help: str, bounds: Sequence[float]) -> None:
        self.help, self.bounds = help, tuple(bounds)
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        out, total = _head(name, self.help, "histogram"), 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self.sum:.12g}", f"{name}_count {total}"]


class Metrics:
    """Everything that `/metrics` says. Used from the event loop alone."""

    def __init__(self) -> None:
        self.requests = Counter("Requests that have ended, by route and status.")
        self.prompt_tokens = Counter("Tokens of prompts.")
        self.cached_tokens = Counter("Tokens of prompts that were known already.")
        self.generated_tokens = Counter("Tokens of answers.")
        self.cancelled = Counter("Answers that ended because nobody waited for them any more.")
        self.refused = Counter("Requests turned away because the queue was full.")
        self.first_token = Histogram("Seconds from a request to its first token.", _SECONDS)
        self.per_token = Histogram("Seconds for each later token of an answer.", _PER_TOKEN)
        self.duration = Histogram("Seconds from a request to the end of its answer.", _SECONDS)
        self.answer_tokens = Histogram("Tokens of an answer.", _TOKENS)
        self.gauges: dict[str, Gauge] = {}
        self.counters: dict[str, Counter] = {}  # beside those above

    def text(self) -> str:
        """The exposition."""
        named: dict[str, Counter | Histogram | Gauge] = {
            "requests_total": self.requests,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_prompt_tokens_total": self.cached_tokens,
            "generated_tokens_total": self.generated_tokens,
            "cancelled_total": self.cancelled,
            "refused_total": self.refused,
            "time_to_first_token_seconds": self.first_token,
            "time_per_token_seconds": self.per_token,
            "answer_seconds": self.duration,
            "answer_tokens": self.answer_tokens,
            **self.counters,
            **self.gauges,
        }
        return "".join(f"{line}\n" for name, metric in named.items() for line in metric.lines(f"cabochon_{name}"))


def _head(name: str, told: str, kind: str) -> list[str]:
    return [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"{{{inner}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
