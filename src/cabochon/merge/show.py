"""A diagnosis for eyes: a table for the terminal, a heat map of layers and kinds, and the curve of a sweep."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cabochon.base.errors import UsageError, nearest
from cabochon.base.plot import Series, heat_map, line_plot
from cabochon.merge.axes import Axis
from cabochon.merge.diagnose import Diagnosis, Measured, place
from cabochon.merge.sweep import Point

if TYPE_CHECKING:
    from rich.table import Table

Number = float | None


def _mean(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# What can be drawn: a number for a tensor (over models or pairs of models, the mean), its title and its unit.
MEASURES: Mapping[str, tuple[Callable[[Measured], Number], str, str]] = {
    "norm": (
        lambda m: _mean([None if n is None else 100 * n for n in m.relative_norms]),
        "Length of task vectors",
        "%",
    ),
    "angle": (lambda m: _mean(m.angles), "Angle between task vectors", "\u00b0"),
    "weights": (lambda m: _mean(m.weight_angles), "Angle between whole weights", "\u00b0"),
    "clash": (lambda m: 100 * m.clash_share, "Elements whose signs clash", "%"),
    "outvoted": (lambda m: 100 * m.outvoted_share, "Magnitude that TIES outvotes", "%"),
}


def table(diagnosis: Diagnosis, by: str = "kind") -> "Table":
    """A rich table with a row for every kind of tensor, or every layer (`by` "layer"), and one for all.

    Where there are several pairs of models, angles are shown from the least to the largest.
    """
    from rich.table import Table

    made = Table(title=_title(diagnosis))
    made.add_column(by)
    for model in diagnosis.models:
        made.add_column(f"length, {model}", justify="right")
    for head in ("angle", "of weights", "signs clash", "outvoted"):
        made.add_column(head, justify="right")
    groups = diagnosis.kinds if by == "kind" else {str(n): m for n, m in diagnosis.layers.items()}
    for name, measured in groups.items():
        made.add_row(name, *_cells(measured))
    made.add_section()
    made.add_row("all", *_cells(diagnosis.total))
    return made


def heat(diagnosis: Diagnosis, measure: str = "angle") -> str:
    """An SVG of layers and kinds of tensors, coloured by one of `MEASURES`. Raises `UsageError` for another name."""
    if measure not in MEASURES:
        close = nearest(measure, MEASURES)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(MEASURES)}"
        raise UsageError(f"a diagnosis has no {measure}", "the name is unknown", hint)
    value, title, unit = MEASURES[measure]
    places = {place(name): measured for name, measured in diagnosis.tensors.items()}
    layers = sorted({layer for layer, _ in places if layer is not None})
    kinds = list(dict.fromkeys(kind for layer, kind in places if layer is not None))
    cells = [[value(places[n, kind]) if (n, kind) in places else None for kind in kinds] for n in layers]
    whole = value(diagnosis.total)
    told = f"{title} of {_title(diagnosis)}, for {len(layers)} layers and {len(kinds)} kinds of tensors."
    told += "" if whole is None else f" All tensors together: {whole:.3g}{unit}."
    return heat_map(cells, [str(n) for n in layers], kinds, title=title, description=told, unit=unit, row_label="layer")


def swept_table(axes: Sequence[Axis], points: Sequence[Point], best: Point | None = None) -> "Table":
    """A rich table with a row for every point of a sweep, and a mark at the best."""
    from rich.table import Table

    made = Table()
    for name in (*axes, *(points[0].scores if points else ())):
        made.add_column(str(name).replace("_", " "), justify="right")
    made.add_column("")
    for point in points:
        cells = [f"{value:g}" for value in point.values] + [f"{score:.5g}" for score in point.scores.values()]
        made.add_row(*cells, "best" if point is best else "")
    return made


def sweep(axes: Sequence[Axis], points: Sequence[Point], score: str, *, title: str) -> str:
    """An SVG of one score over the values of a parameter, or over those of two as a map."""
    label = score.replace("_", " ")
    if len(axes) == 1:
        curve = sorted((point.values[0], point.scores[score], f"{point.scores[score]:.4g}") for point in points)
        return line_plot([Series("", curve)], title=title, x_label=str(axes[0]), y_label=label)
    found = {point.values: point.scores[score] for point in points}
    rows, columns = axes
    cells = [[found.get((y, x)) for x in columns.values] for y in rows.values]
    return heat_map(
        cells,
        [f"{value:g}" for value in rows.values],
        [f"{columns} = {value:g}" for value in columns.values],
        title=title,
        description=f"{label} for {len(rows.values)} values of {rows} and {len(columns.values)} of {columns}",
        row_label=str(rows),
        show=lambda value: f"{value:.4g}",
    )


def _title(diagnosis: Diagnosis) -> str:
    trimmed = f", signs at density {diagnosis.density:g}" if diagnosis.density < 1 else ""
    return f"{', '.join(diagnosis.models)} against the base{trimmed}"


def _cells(measured: Measured) -> list[str]:
    lengths = ["-" if share is None else f"{100 * share:.3g}%" for share in measured.relative_norms]
    angles = [_range(values) for values in (measured.angles, measured.weight_angles)]
    return [*lengths, *angles, f"{100 * measured.clash_share:.1f}%", f"{100 * measured.outvoted_share:.1f}%"]


def _range(values: Sequence[Number]) -> str:
    known = sorted({f"{value:.2f}\u00b0": value for value in values if value is not None}.items(), key=lambda kv: kv[1])
    if not known:
        return "-"
    return known[0][0] if len(known) == 1 else f"{known[0][0]} to {known[-1][0]}"
