"""What a training run shows while it goes: a live line on a terminal, plain lines elsewhere, JSON for programs."""

import json as json_format
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cabochon.train.run import Run

# What every record of a report has; whatever else is in one was measured by the objective.
USUAL = frozenset({
    "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "share_of_peak", "seconds_per_step",
    "skipped",
})  # fmt: skip


@contextmanager
def shown(run: "Run", *, json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows a record of the log. With `json` each goes to standard output as one line."""
    if json:
        yield lambda record: print(json_format.dumps(record), flush=True)
        return
    steps = run.trainer.config.steps
    if not sys.stderr.isatty():
        yield lambda record: print(line(record, steps), file=sys.stderr, flush=True)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps, completed=run.trainer.step_number)

        def show(record: dict[str, Any]) -> None:
            bar.console.print(line(record, steps), highlight=False)
            bar.update(task, completed=record["step"])

        yield show


def line(record: dict[str, Any], steps: int) -> str:
    """A record in words."""
    at = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if "eval_loss" in record:
        found = {name.removeprefix("eval_"): value for name, value in record.items() if name != "step"}
        return f"{at}  held out: {'  '.join(_measured(found))}"
    words = [
        at,
        f"loss {_number(record['loss'])}",
        *_measured({name: value for name, value in record.items() if name not in USUAL}),
        f"gradient {_number(record['grad_norm'])}",
        f"rate {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['share_of_peak']:.0%} of peak",
        left(record, steps),
    ]
    if record["skipped"]:
        words.append(f"{record['skipped']} left out")
    return "  ".join(word for word in words if word)


def _measured(values: dict[str, float | None]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items()]


def left(record: dict[str, Any], steps: int) -> str:
    """How long the rest will take, as long as the last steps did."""
    seconds = record["seconds_per_step"] * (steps - record["step"])
    minutes, hours = seconds / 60, seconds / 3600
    if seconds <= 0:
        return ""
    return (
        f"{hours:.1f} h left" if hours >= 2 else f"{minutes:.0f} min left" if minutes >= 2 else f"{seconds:.0f} s left"
    )


def _short(value: float | None) -> str:
    small = value is not None and 0 < abs(value) < 0.001  # a divergence of 0.0002 is not 0
    return f"{value:.1e}" if small else _number(value)


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"
