"""A report for eyes: a table in the terminal and in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cabochon.evaluate.compare import Difference
from cabochon.evaluate.results import Report, Result

if TYPE_CHECKING:
    from rich.table import Table


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the main table: what counts of each task that was asked for."""
    chosen = [r for r in report.results if r.counts and r.part_of is None]
    others = list(dict.fromkeys(name for r in chosen for name in r.published))
    guesses = any(r.random is not None for r in chosen)
    heads = ["task", "score", "±", "items", "shots", *(["random", "majority"] if guesses else []), *others]
    return heads, [_row(r, guesses, others) for r in chosen]


def _row(r: Result, guesses: bool, others: Sequence[str]) -> list[str]:
    guessed = [number(r, r.random), number(r, r.majority)] if guesses else []
    known = [number(r, r.published.get(name)) for name in others]
    shots = "" if r.shots is None else str(r.shots)
    return [name(r), number(r, r.value), number(r, r.stderr), str(r.items), shots, *guessed, *known]


def name(r: Result) -> str:
    """A task with what is not plain about its score."""
    unit = "" if r.percent else f", {r.metric.split(',')[0].replace('_', ' ')}"
    return f"{r.label}{unit}"


def number(r: Result, value: float | None) -> str:
    """On the result's scale: percent, or as it is."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" if r.percent else f"{value:.3f}"


def table(report: Report) -> "Table":
    """For the terminal."""
    heads, cells = rows(report)
    return _table(f"{report.model}, in percent", heads, cells)


def spreads_table(report: Report) -> "Table":
    """The spreads over formats, for the terminal."""
    return _table("over formats of the prompts, in percent", *_spreads(report))


def differences_table(found: Sequence[Difference], first: str, second: str) -> "Table":
    """Two runs beside each other, for the terminal."""
    return _table("95% intervals of the difference, in percent where scores are", *_differences(found, first, second))


def markdown(report: Report) -> str:
    """Everything but the items."""
    parts = [f"# {report.model}", _settings(report), _markdown(*rows(report))]
    inner = [r for r in report.results if r.counts and r.part_of is not None]
    if inner:
        cells = [[name(r), number(r, r.value), number(r, r.stderr), str(r.items)] for r in inner]
        parts += ["## Parts", _markdown(["task", "score", "±", "items"], cells)]
    if report.spreads:
        parts += ["## Formats of the prompts", _markdown(*_spreads(report))]
    if report.failures:
        parts += ["## What could not be run", *(f"- {f.what}: {f.cause}. {f.hint}" for f in report.failures)]
    parts += [f"- {note}" for note in notes(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(report: Report) -> list[str]:
    """What a reader has to know of the scores."""
    cut = [f"{r.label} {r.truncated}" for r in report.results if r.counts and r.part_of is None and r.truncated]
    lost = "requests that were longer than the context lost their beginning"
    return [*report.notes, *([f"{lost}: {', '.join(cut)}"] if cut else [])]


def differences_markdown(found: Sequence[Difference], first: str, second: str) -> str:
    """Two runs beside each other."""
    return _markdown(*_differences(found, first, second)) + "\n"


def _differences(found: Sequence[Difference], first: str, second: str) -> tuple[list[str], list[list[str]]]:
    heads = ["task", "items", first, second, "difference", "from", "to", "certain"]
    cells = []
    for d in found:
        bits = d.metric.startswith(("bits", "byte", "word"))
        values = (d.first, d.second, d.difference, d.low, d.high)
        shown = [f"{v:.3f}" if bits else f"{100 * v:.1f}" for v in values]
        cells.append([d.task, str(d.items), *shown, "yes" if d.certain else "no"])
    return heads, cells


def _spreads(report: Report) -> tuple[list[str], list[list[str]]]:
    cells = [
        [s.task, str(s.formats), *(f"{100 * v:.1f}" for v in (s.mean, s.deviation, s.lowest, s.highest))]
        for s in report.spreads
    ]
    return ["task", "formats", "mean", "deviation", "lowest", "highest"], cells


def _settings(report: Report) -> str:
    return ", ".join(f"{key} {value}" for key, value in report.settings.items() if value not in (None, "", False))


def _markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> "Table":
    from rich.table import Table

    made = Table(title=title)
    for place, head in enumerate(heads):
        made.add_column(head, justify="right" if place else "left")
    for row in cells:
        made.add_row(*row)
    return made
