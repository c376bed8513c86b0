"""Plots are sound XML that stands alone, can be read without eyes, and shows its numbers where they are."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.plot import DARK, LIGHT, STRONGEST, Bar, Series, bar_plot, heat_map, line_plot

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [(0.0, 1.0, "start"), (0.5, 3.0, ""), (1.0, 2.0, "end")]


def parsed(text):
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def line(**more):
    return line_plot([Series("reward", POINTS)], title="A sweep", x_label="eta", y_label="score", **more)


def heat(**more):
    return heat_map([[1.0, None], [2.5, 4.0]], ["0", "1"], ["q", "k"], title="Angles", row_label="layer", **more)


def bars(**more):
    made = [Bar("facts", 80.0, 4.0, {"random": 25.0, "Gemma": 90.0}), Bar("sums", 40.0, 0.0, {"random": 0.0})]
    return bar_plot(made, title="Scores", x_label="percent", **more)


@pytest.mark.parametrize("text", [line(), heat(), bars()], ids=["line", "heat", "bars"])
def test_plots_are_accessible_and_stand_alone(text):
    root = parsed(text)
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.text
    assert description.text
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"url\(|href|@import|<script|https?://(?!www\.w3\.org/2000/svg)", text)


def test_a_line_goes_through_its_points():
    root = parsed(line())
    path = next(p.get("d") for p in root.iter(f"{SVG}path") if "line" in p.get("class"))
    (x0, y0), (x1, y1), (x2, y2) = [map(float, pair) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)  # upwards is less
    assert {"start", "end", "eta", "score", "0.4", "3.0"} <= set(texts(root))
    assert root.find(f"{SVG}desc").text == "reward: 3 points, from 1 at 0 to 2 at 1"


def test_bars_are_as_long_as_their_values_and_whiskers_as_wide_as_errors():
    root = parsed(bars())
    boxes = [b for b in root.iter(f"{SVG}rect") if b.get("class") == "heat"]
    first, second = (float(box.get("width")) for box in boxes)
    assert first == pytest.approx(2 * second, rel=0.01)
    low, high = next(
        map(float, found.groups())
        for p in root.iter(f"{SVG}path")
        if p.get("class") == "axis" and (found := re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", p.get("d")))
    )
    assert high - low == pytest.approx(first / 10, abs=0.3)
    tips = [title.text for title in root.iter(f"{SVG}title")]
    assert {"facts: 80 ± 4", "sums: 40", "facts, random: 25", "facts, Gemma: 90", "sums, random: 0"} <= set(tips)
    assert {"facts", "sums", "random", "Gemma", "percent"} <= set(texts(root))
    assert parsed(bar_plot([], title="none")) is not None
    assert parsed(bar_plot([Bar("x", math.nan)], title="hole")) is not None


def test_series_differ_in_more_than_colour():
    root = parsed(line_plot([Series(str(i), POINTS) for i in range(5)], title="five"))
    lines = [p for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("line")]
    assert len({p.get("stroke-dasharray") for p in lines}) == 5
    marks = [re.sub(r"^M[\d. ]+", "", p.get("d")) for p in root.iter(f"{SVG}path") if "mark" in p.get("class")]
    assert len(set(marks)) == 5


def test_lines_break_where_a_value_is_not_finite():
    points = [(0, 0, ""), (1, math.nan, "gone"), (2, 2, ""), (3, 1, "")]
    root = parsed(line_plot([Series("loss", points)], title="a gap"))
    path = next(p.get("d") for p in root.iter(f"{SVG}path") if "line" in p.get("class"))
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert "gone" not in texts(root)


def test_of_many_labels_the_ends_and_extremes_stay():
    points = [(i, -abs(i - 20), f"p{i}") for i in range(50)]
    shown = [text for text in texts(parsed(line_plot([Series("", points)], title="many"))) if text and text[0] == "p"]
    assert sorted(shown) == ["p0", "p20", "p49"]


def test_the_largest_number_is_the_strongest_and_a_hole_is_empty():
    root = parsed(heat(unit="\u00b0"))
    cells = {g.find(f"{SVG}title").text: g.find(f"{SVG}rect") for g in root.iter(f"{SVG}g")}
    assert list(cells) == ["layer 0, q: 1\u00b0", "layer 1, q: 2.5\u00b0", "layer 1, k: 4\u00b0"]
    opacities = [float(rect.get("fill-opacity")) for rect in cells.values()]
    assert opacities == sorted(opacities)
    assert opacities[-1] == STRONGEST
    assert {"q", "k", "0", "1", "layer", "2.5", "1\u00b0", "4\u00b0"} <= set(texts(root))


def luminance(colour):
    parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def rgb(text):
    return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_can_be_told_from_what_is_behind(colours):
    paper, ink, heat = (rgb(colours[name]) for name in ("paper", "ink", "heat"))
    strongest = [STRONGEST * h + (1 - STRONGEST) * p for h, p in zip(heat, paper, strict=True)]
    assert contrast(ink, paper) >= 7
    assert contrast(ink, strongest) >= 4.5
    for number in range(5):
        assert contrast(rgb(colours[f"s{number}"]), paper) >= 4.5


def test_two_plots_in_one_page_do_not_share_names():
    assert parsed(line()).get("id") != parsed(line(description="another")).get("id")
    assert line() == line()


@pytest.mark.parametrize(
    "points", [[], [(1, 1, "")], [(0, 5, ""), (1, 5, "")], [(0, 1e-9, ""), (1, 1e12, "")]], ids=str
)
def test_odd_ranges_are_drawn(points):
    root = parsed(line_plot([Series("x", points)], title="odd"))
    assert "nan" not in ElementTree.tostring(root).decode()


def test_an_empty_or_even_map_is_drawn():
    parsed(heat_map([], [], [], title="nothing"))
    parsed(heat_map([[None]], ["a"], ["b"], title="nothing"))
    parsed(heat_map([[3.0, 3.0]], ["a"], ["b", "c"], title="even"))


NUMBERS = st.floats(-1e30, 1e30)


@given(st.text(), st.lists(st.tuples(NUMBERS, NUMBERS, st.text()), max_size=9))
def test_any_text_and_any_numbers_are_sound_xml(text, points):
    parsed(line_plot([Series(text, points), Series("", points)], title=text, x_label=text, y_label=text))
    parsed(heat_map([[y for _, y, _ in points]], [text], [label for _, _, label in points], title=text, row_label=text))
