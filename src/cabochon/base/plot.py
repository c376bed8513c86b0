"""Line plots, heat maps and bars as SVG, written by hand: text in, text out, nothing loaded.

The files stand alone. They have a title and a description for readers of the screen, every number as text or as a
tooltip, the font of the system, and colours for light and dark that follow `prefers-color-scheme`. Series differ in
dashes and markers as well as in colour.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

# Colours: paper, ink, lines of the grid, what heat is made of, and series (Okabe and Ito, darker or lighter).
LIGHT = {"paper": "#ffffff", "ink": "#1b1d21", "grid": "#d5d9df", "heat": "#2f7fd1"}
LIGHT |= {"s0": "#0b5cad", "s1": "#b04a00", "s2": "#00714f", "s3": "#8f3a76", "s4": "#6b5b00"}
DARK = {"paper": "#14161a", "ink": "#eceef1", "grid": "#3a3f47", "heat": "#2767b0"}
DARK |= {"s0": "#7db8ff", "s1": "#ff9d5c", "s2": "#4fd1a5", "s3": "#e79fd0", "s4": "#e0cc5a"}
FAINTEST, STRONGEST = 0.06, 0.85  # opacity of heat: ink has to stay readable on it
SERIES = 5
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2 1 2")
_ALL_LABELS = 12  # with more points than this, only those that matter keep their label
_GLYPH = 6.6  # width of a character of 11 px, about


@dataclass(frozen=True)
class Series:
    """One line: points (x, y, label) in the order in which they are joined. An empty label is none."""

    name: str
    points: Sequence[tuple[float, float, str]]


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    description: str = "",
    x_label: str = "",
    y_label: str = "",
    width: int = 640,
    height: int = 400,
) -> str:
    """Lines with markers between two axes. Where x or y is not finite, a line is broken.

    Without a description, one is made of the ends of each line.
    """
    sound = [[p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])] for one in series]
    x_ticks = _ticks([x for points in sound for x, _, _ in points])
    y_ticks = _ticks([y for points in sound for _, y, _ in points])
    left = 34 + max(len(label) for _, label in y_ticks) * _GLYPH
    x = _scale(x_ticks, left, width - 24)
    y = _scale(y_ticks, height - 50, 44 + 18 * (len(series) > 1))
    parts = [*_axes(x_ticks, y_ticks, x, y, x_label, y_label, width, height)]
    for number, one in enumerate(series):
        parts += _line(one, number % SERIES, x, y, width)
    if len(series) > 1:
        parts += _keys([one.name for one in series], left)
    told = description or "; ".join(_ends(one.name, points) for one, points in zip(series, sound, strict=True))
    return _document(title, told, parts, width, height)


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    description: str = "",
    unit: str = "",
    row_label: str = "",
    show: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> str:
    """A table of numbers whose cells are the stronger in colour the larger the number; None is an empty cell.

    Args:
        values: of each row, one for each column.
        unit: behind the numbers of the scale.
        show: writes a number into its cell.
    """
    known = [value for row in values for value in row if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    longest = max((len(show(value)) for value in known), default=1)
    cell, line = max(46.0, longest * _GLYPH + 10), 22
    left = 22 + max(map(len, [*rows, row_label]), default=0) * _GLYPH
    head = 52 + max(map(len, columns), default=0) * _GLYPH * 0.72
    width = round(max(left + cell * len(columns) + head * 0.5, 300, len(title) * 9 + 32))
    height = round(head + line * len(rows) + 56)
    parts = [_text(left - 8, head - 6, row_label, "end")] if row_label else []
    for j, column in enumerate(columns):
        place = left + cell * (j + 0.5)
        parts.append(f'<text transform="translate({place:.1f} {head - 6:.1f}) rotate(-45)">{_safe(column)}</text>')
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = head + line * i
        parts.append(_text(left - 8, top + 15, name, "end"))
        for j, (column, value) in enumerate(zip(columns, row, strict=True)):
            if value is not None and math.isfinite(value):
                tip = f"{row_label} {name}, {column}: {show(value)}{unit}".strip()
                parts.append(_heat(left + cell * j, top, cell, line, _share(value, low, high), show(value), tip))
    parts += _heat_scale(left, head + line * len(rows) + 18, f"{show(low)}{unit}", f"{show(high)}{unit}")
    told = description or f"{len(rows)} rows and {len(columns)} columns, from {show(low)}{unit} to {show(high)}{unit}"
    return _document(title, told, parts, width, height)


@dataclass(frozen=True)
class Bar:
    """One bar: its length, half the width of its whisker, and values of others by name, which become markers."""

    label: str
    value: float
    error: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)


def bar_plot(bars: Sequence[Bar], *, title: str, description: str = "", x_label: str = "", width: int = 640) -> str:
    """Horizontal bars from 0, with whiskers, and markers for what they are compared to."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.others))
    ends = [0.0, *(v for bar in bars for v in (bar.value + bar.error, *bar.others.values()) if math.isfinite(v))]
    x_ticks = _ticks(ends)
    left = 22 + max((len(bar.label) for bar in bars), default=0) * _GLYPH
    line, top = 26, 44 + 18 * bool(names)
    height = top + line * len(bars) + 50
    x = _scale(x_ticks, left, width - 24)
    rows = [(float(n), "") for n in (len(bars), 0)]  # the first bar on top
    y = _scale(rows, top + line * len(bars), top) if bars else lambda _: float(top)
    parts = _axes(x_ticks, rows, x, y, x_label, "", width, height) if bars else []
    for number, bar in enumerate(bars):
        middle = top + line * (number + 0.5)
        parts += _bar(bar, x, middle, names)
    if names:
        parts += _keys(names, left)
    told = description or "; ".join(f"{bar.label}: {bar.value:.4g}" for bar in bars)
    return _document(title, told, parts, width, height)


def _bar(bar: Bar, x: Callable[[float], float], middle: float, names: Sequence[str]) -> list[str]:
    parts = [_text(x(0) - 8, middle + 4, bar.label, "end")]
    if math.isfinite(bar.value):
        tip = f"{bar.label}: {bar.value:.4g} ± {bar.error:.2g}" if bar.error else f"{bar.label}: {bar.value:.4g}"
        size = f'width="{max(0.0, x(bar.value) - x(0)):.1f}" height="14"'
        box = f'<rect class="heat" x="{x(0):.1f}" y="{middle - 7:.1f}" {size} fill-opacity="0.6"/>'
        parts.append(f"<g>{box}<title>{_safe(tip)}</title></g>")
    if bar.error and math.isfinite(bar.error):
        low, high = x(bar.value - bar.error), x(bar.value + bar.error)
        parts.append(f'<path class="axis" d="M{low:.1f} {middle:.1f}H{high:.1f}"/>')
    for name, value in bar.others.items():
        if math.isfinite(value):
            marker = _marker(x(value), middle, names.index(name) % SERIES)
            parts.append(f"<g>{marker}<title>{_safe(f'{bar.label}, {name}: {value:.4g}')}</title></g>")
    return parts


def _ticks(values: Sequence[float], count: int = 5) -> list[tuple[float, str]]:
    """Round numbers around all values, 1, 2 or 5 times a power of ten apart, and how they are written."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= max(1e-300, 1e-12 * max(abs(low), abs(high))):
        margin = abs(low) / 2 if abs(low) > 1e-300 else 0.5
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * times for times in (1, 2, 5, 10) if power * times * count >= (high - low) * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    size = max(abs(first), abs(last)) * step
    if 1e-4 <= size < 1e6:
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]
    return [(i * step, f"{i * step:.4g}") for i in range(first, last + 1)]


def _scale(ticks: Sequence[tuple[float, str]], start: float, end: float) -> Callable[[float], float]:
    low, high = ticks[0][0], ticks[-1][0]
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_label: str,
    y_label: str,
    width: int,
    height: int,
) -> list[str]:
    left, right, bottom, top = x(x_ticks[0][0]), x(x_ticks[-1][0]), y(y_ticks[0][0]), y(y_ticks[-1][0])
    parts = []
    for value, label in y_ticks:
        parts.append(f'<path class="grid" d="M{left:.1f} {y(value):.1f}H{right:.1f}"/>')
        parts.append(_text(left - 6, y(value) + 4, label, "end"))
    for value, label in x_ticks:
        parts.append(f'<path class="axis" d="M{x(value):.1f} {bottom:.1f}v5"/>')
        parts.append(_text(x(value), bottom + 18, label, "middle"))
    parts.append(f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    parts.append(_text((left + right) / 2, height - 12, x_label, "middle"))
    turned = f"translate(14 {(top + bottom) / 2:.1f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{_safe(y_label)}</text>')
    return parts


def _line(
    series: Series, style: int, x: Callable[[float], float], y: Callable[[float], float], width: int
) -> list[str]:
    path, joined, shown = [], False, []
    for px, py, label in series.points:
        if not (math.isfinite(px) and math.isfinite(py)):
            joined = False
            continue
        path.append(f"{'L' if joined else 'M'}{x(px):.1f} {y(py):.1f}")
        joined = True
        shown.append((px, py, label))
    parts = [f'<path class="line s{style}" stroke-dasharray="{_DASHES[style]}" d="{"".join(path)}"/>'] if path else []
    labelled = _labelled(shown)
    for number, (px, py, label) in enumerate(shown):
        tip = f"{series.name} {label}: {px:.6g}, {py:.6g}".strip()
        parts.append(f"<g>{_marker(x(px), y(py), style)}<title>{_safe(tip)}</title></g>")
        if number in labelled:
            half = len(label) * _GLYPH / 2
            place = min(max(x(px), half), width - half - 4)
            parts.append(f'<g class="over">{_text(place, y(py) - 9, label, "middle")}</g>')
    return parts


def _labelled(points: Sequence[tuple[float, float, str]]) -> set[int]:
    """Which points show their label: all, or of many the ends and the extremes."""
    every = list(range(len(points)))
    if len(points) > _ALL_LABELS:
        by_height = sorted(every, key=lambda i: points[i][1])
        every = [0, len(points) - 1, by_height[0], by_height[-1]]
    return {i for i in every if points[i][2]}


def _marker(x: float, y: float, style: int) -> str:
    shapes = (
        f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z",
        f"M{x:.1f} {y + 4:.1f}l4 -7h-8z",
    )
    return f'<path class="mark s{style}" d="{shapes[style]}"/>'


def _keys(names: Sequence[str], left: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        style = number % SERIES
        parts.append(f'<path class="line s{style}" stroke-dasharray="{_DASHES[style]}" d="M{left:.1f} 46h22"/>')
        parts += [_marker(left + 11, 46, style), _text(left + 27, 50, name)]
        left += 45 + len(name) * _GLYPH
    return parts


def _heat(x: float, y: float, width: float, height: float, share: float, label: str, tip: str) -> str:
    opacity = FAINTEST + share * (STRONGEST - FAINTEST)
    box = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"'
    text = _text(x + width / 2, y + height / 2 + 4, label, "middle")
    return f'<g><rect class="heat" {box} fill-opacity="{opacity:.3f}"/>{text}<title>{_safe(tip)}</title></g>'


def _heat_scale(left: float, top: float, low: str, high: str) -> list[str]:
    start = left + len(low) * _GLYPH + 6
    steps = [
        f'<rect class="heat" x="{start + 12 * i:.1f}" y="{top:.1f}" width="12" height="12" '
        f'fill-opacity="{FAINTEST + i / 9 * (STRONGEST - FAINTEST):.3f}"/>'
        for i in range(10)
    ]
    return [_text(left, top + 10, low), *steps, _text(start + 126, top + 10, high)]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.0


def _ends(name: str, points: Sequence[tuple[float, float, str]]) -> str:
    if not points:
        return f"{name}: no points".strip(": ")
    (x0, y0, _), (x1, y1, _) = points[0], points[-1]
    prefix = f"{name}: " if name else ""
    return f"{prefix}{len(points)} points, from {y0:.4g} at {x0:.4g} to {y1:.4g} at {x1:.4g}"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    """Text for XML, which has no control characters and no halves of surrogate pairs."""
    return escape(re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def _document(title: str, description: str, parts: Sequence[str], width: int, height: int) -> str:
    body = "\n".join(parts)
    # Several of these can stand in one page: their names and styles must not meet.
    key = "p" + hashlib.sha256(f"{title}{description}{body}".encode("utf-8", "replace")).hexdigest()[:10]

    def rules(colours: dict[str, str]) -> str:
        series = "".join(f"#{key} .s{i}{{color:{colours[f's{i}']}}}" for i in range(SERIES))
        return (
            f"#{key} .paper{{fill:{colours['paper']}}}#{key} text{{fill:{colours['ink']}}}"
            f"#{key} .grid{{stroke:{colours['grid']}}}#{key} .axis{{stroke:{colours['ink']}}}"
            f"#{key} .heat{{fill:{colours['heat']}}}#{key} .over{{stroke:{colours['paper']}}}{series}"
        )

    style = (
        f"#{key}{{font:11px system-ui,sans-serif}}#{key} .title{{font-size:15px;font-weight:600}}"
        f"#{key} .line{{fill:none;stroke:currentColor;stroke-width:1.8}}#{key} .mark{{fill:currentColor}}"
        f"#{key} .axis,#{key} .grid{{fill:none}}#{key} .over{{stroke-width:3;paint-order:stroke}}{rules(LIGHT)}"
        f"@media (prefers-color-scheme:dark){{{rules(DARK)}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{key}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="{key}t {key}d">\n'
        f'<title id="{key}t">{_safe(title)}</title>\n<desc id="{key}d">{_safe(description)}</desc>\n'
        f"<style>{style}</style>\n"
        f'<rect class="paper" width="{width}" height="{height}"/>\n'
        f'<text class="title" x="16" y="26">{_safe(title)}</text>\n{body}\n</svg>\n'
    )
