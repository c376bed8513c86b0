"""Sweeps: what a typed axis means, that every point is the merge it says it is, and that none is measured twice."""

import contextlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.cli.main import main
from cabochon.merge import sweep as module
from cabochon.merge.axes import Axis, at, grid, parse_axis
from cabochon.merge.config import Filtered
from cabochon.merge.parse import parse_config
from cabochon.merge.run import Merge
from cabochon.merge.show import sweep as drawn
from cabochon.merge.sweep import Point, append_point, read_points, sweep
from cabochon.model.gemma2 import Gemma2
from cabochon.weights.folder import load_model
from cabochon.weights.init import init_folder
from support import SMALL, random_ids

TEXTS = [
    ("t=0:1:5", Axis("t", (0, 0.25, 0.5, 0.75, 1))),
    ("t=1:0:2", Axis("t", (1, 0))),
    ("eta=0.1,-2,1e-3", Axis("eta", (0.1, -2, 1e-3))),
    ("t=0:0.3:4", Axis("t", (0, 0.1, 0.2, 0.3))),
    ("weight@a/b@main=1", Axis("weight", (1,), "a/b@main")),
    ("weight@x=y=1,2", Axis("weight", (1, 2), "x=y")),
]


@pytest.mark.parametrize(("text", "axis"), TEXTS)
def test_axes(text: str, axis: Axis) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    "text", ["t", "=1", "t=", "t=0:1", "t=0:1:1", "t=0:1:9999", "t=a", "t=1,1", "t=nan", "t=0:inf:3"]
)
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(UsageError, match="is not a sweep"):
        parse_axis(text)


@given(st.text(max_size=20))
def test_any_text_is_an_axis_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        axis = parse_axis(text)
        assert axis.name and axis.values and parse_axis(f"{axis}={','.join(map(repr, axis.values))}") == axis


def test_grids() -> None:
    one, two = Axis("t", (0, 1)), Axis("u", (2, 3, 4))
    assert grid([one]) == [(0,), (1,)]
    assert grid([one, two]) == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    for axes in (
        [],
        [one, one],
        [one, two, Axis("v", (1,))],
        [Axis("t", tuple(range(40))), Axis("u", tuple(range(40)))],
    ):
        with pytest.raises(UsageError):
            grid(axes)


SLICES = """
slices:
  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}, {model: b, layer_range: [0, 1]}]
    parameters: {density: 0.4, weight: [1, 2]}
merge_method: ties
base_model: base
parameters: {density: [{filter: mlp, value: 0.2}, {value: 0.3}], weight: 5, normalize: true}
"""


def test_a_value_counts_instead_of_all_others() -> None:
    config = at(parse_config(SLICES), [Axis("density", (0.9,))], [0.9])
    assert config.parameters == {"density": 0.9, "weight": 5, "normalize": True}
    assert config.slices[0].parameters == {"weight": (1, 2)}
    config = at(parse_config(SLICES), [Axis("weight", (7,), "b")], [7])
    assert [s.parameters for s in config.slices[0].sources] == [{"weight": 1}, {"weight": 7}]
    assert config.parameters["density"] == (Filtered(0.2, "mlp"), Filtered(0.3))
    assert at(config, [Axis("weight", (8,), "b")], [8]) == at(parse_config(SLICES), [Axis("weight", (8,), "b")], [8])


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("densty", "did you mean density?"),
        ("t", "ties has weight, density"),
        ("lambda@a", "one value for all models"),
        ("weight@base", "it is the base"),
        ("weight@c", "there are a, b"),
    ],
)
def test_what_cannot_be_swept(axis: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        at(parse_config(SLICES), [parse_axis(f"{axis}=0,1")], [0])
    assert said in str(caught.value)


# Merges


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        init_folder(SMALL, folder / name, dtype=torch.float32, seed=seed, tokenizer=False)
    return folder


def config(models: Path, method: str = "liti", more: str = "") -> str:
    return f"models: [{{model: {models}/b}}]\nbase_model: {models}/a\nmerge_method: {method}\ndtype: bfloat16\n{more}"


def logits(model: Gemma2) -> dict[str, float]:
    ids = random_ids(SMALL, 1, 12)
    with torch.inference_mode():
        return {"sum": float(model(ids).double().square().sum()), "dtype": float(model.embedding.weight.dtype.itemsize)}


@pytest.mark.parametrize(("method", "name"), [("liti", "eta"), ("slerp", "t"), ("warp", "eta")])
def test_a_point_is_the_merge_that_would_be_written(method: str, name: str, models: Path, tmp_path: Path) -> None:
    axis = Axis(name, (0.0, 0.3, 1.0))
    work = Merge.prepare(at(parse_config(config(models, method)), [axis], [0.0]))
    found = list(sweep(work, [axis], logits, measure="m", threads=2))
    assert [point.values for point in found] == [(0.0,), (0.3,), (1.0,)]
    for point in found:
        out = tmp_path / f"{point.values[0]}"
        text = config(models, method, f"parameters: {{{name}: {point.values[0]}}}\n")
        Merge.prepare(parse_config(text)).write(out)
        assert point.scores == logits(load_model(out).eval())


def test_what_is_known_is_not_merged_again(models: Path, tmp_path: Path) -> None:
    axis, measured = Axis("eta", (0.0, 0.5, 1.0)), []

    def evaluate(model: Gemma2) -> dict[str, float]:
        measured.append(1)
        return logits(model)

    def run(text: str, measure: str, count: int) -> list[Point]:
        measured.clear()
        points = []
        for point in sweep(Merge.prepare(parse_config(text)), [axis], evaluate, measure=measure, known=known()):
            append_point(tmp_path / "points", point)
            points.append(point)
        assert len(measured) == count
        return points

    def known() -> list[Point]:
        return read_points(tmp_path / "points")

    first = run(config(models), "m", 3)
    assert run(config(models), "m", 0) == first
    run(config(models), "other text", 3)
    run(config(models, more=f"tokenizer_source: {models}/a\n").replace("bfloat16", "float32").split("tok")[0], "m", 3)
    (models / "b/config.json").touch()  # another model, for all that is known
    assert [p.scores for p in run(config(models), "m", 3)] == [p.scores for p in first]


def test_lines_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    path, points = (
        tmp_path / "points",
        [Point((0.1, 2.0), {"s": 1.5}, "k"), Point((0.2, 2.0), {"s": float("nan")}, "l")],
    )
    append_point(path, points[0])
    with path.open("ab") as file:
        file.write(b'{"key": "x", "val')
    append_point(path, points[1])
    path.write_bytes(path.read_bytes() + b"[1]\n\xff\n")
    found = read_points(path)
    assert found[0] == points[0] and (found[1].values, found[1].key) == ((0.2, 2.0), "l") and len(found) == 2
    assert read_points(tmp_path / "nothing") == []


def test_errors_name_the_point_and_come_before_anything_is_merged(models: Path) -> None:
    text = config(models, "ties", "parameters: {weight: 1, density: 1}\n")
    axis = Axis("density", (0.5, 1.5))
    with pytest.raises(BadInput, match=r"at density = 1\.5: density of ties cannot be 1\.5"):
        list(sweep(Merge.prepare(parse_config(text)), [axis], lambda _: pytest.fail("merged"), measure=""))
    text = f"models: [{{model: {models}/a, parameters: {{weight: 1}}}}, {{model: {models}/b}}]\nmerge_method: linear\n"
    axis = Axis("weight", (1.0, -1.0), f"{models}/b")
    work = Merge.prepare(at(parse_config(text), [axis], [1.0]))
    with pytest.raises(BadInput, match=r"at weight@.*b = -1: .* the weights of linear cannot be normalised"):
        list(sweep(work, [axis], logits, measure=""))


def test_a_model_that_does_not_fit_the_memory(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda _: 1000)
    with pytest.raises(MissingResource, match="does not fit the memory"):
        list(sweep(Merge.prepare(parse_config(config(models))), [Axis("eta", (0, 1))], logits, measure=""))


def test_a_curve_is_drawn_from_left_to_right() -> None:
    points = [Point((1.0,), {"s": 2.0}, ""), Point((0.5,), {"s": float("nan")}, ""), Point((0.0,), {"s": 1.0}, "")]
    root = ElementTree.fromstring(drawn([Axis("t", (1, 0.5, 0))], points, "s", title="x"))
    assert root.find("{http://www.w3.org/2000/svg}desc").text == "2 points, from 1 at 0 to 2 at 1"


def test_two_parameters_are_drawn_as_a_map() -> None:
    axes = [Axis("eta", (0.0, 1.0)), Axis("density", (0.2, 0.5, 0.8))]
    points = [Point(values, {"bits_per_byte": sum(values)}, "") for values in grid(axes)]
    root = ElementTree.fromstring(drawn(axes, points[:-1], "bits_per_byte", title="x"))
    tips = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert len(tips) == 5 and tips[1] == "eta 0, density = 0.5: 0.5"


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of two models with tokenizers, without a value for t, and texts."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        main(["init", "--preset", "tiny", "--seed", str(seed), "--out", name])
    Path("merge.yml").write_text("models: [{model: b}]\nbase_model: a\nmerge_method: slerp\n")
    Path("texts.txt").write_text("Some words to measure models on. " * 9)
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command = ["merge", "merge.yml", "--sweep", "t=0,0.5,1", "--on", "texts.txt", "--plot", "curve.svg", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["t"] for point in found["points"]] == [0, 0.5, 1]
    assert found["best"] == min(found["points"], key=lambda point: point["bits_per_byte"])
    assert "from" in ElementTree.fromstring(Path("curve.svg").read_text()).find("{http://www.w3.org/2000/svg}desc").text
    kept = Path("curve.svg.jsonl").read_text()
    assert len(kept.splitlines()) == 3
    assert main(command) == 0 and Path("curve.svg.jsonl").read_text() == kept
    assert main(command[:-3]) == 0
    assert "best" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == [
        "a",
        "b",
        "curve.svg",
        "curve.svg.jsonl",
        "merge.yml",
        "texts.txt",
    ]


def test_right_answers_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n{"prompt": "1", "completion": "2"}\n')
    capsys.readouterr()
    assert main(["merge", "merge.yml", "--sweep", "t=0,1", "--on", "texts.jsonl", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert all(0 <= point["correct"] <= 1 and list(point)[1] == "correct" for point in points)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--sweep", "t=0,1"], 2),
        (["--on", "texts.txt"], 2),
        (["--sweep", "t=0,1", "--on", "texts.txt", "--inspect"], 2),
        (["--sweep", "t=0,1", "--on", "texts.txt", "--dry-run"], 2),
        (["out", "--sweep", "t=0,1", "--on", "texts.txt"], 2),
        (["--sweep", "u=0,1", "--on", "texts.txt"], 2),
        (["--sweep", "t=0,1", "--on", "nothing.txt"], 4),
        (["--sweep", "t=0,1", "--on", "texts.txt", "--plot", "nowhere/curve.svg"], 4),
    ],
)
def test_flags_that_do_not_go_together(folder: Path, flags: list[str], code: int) -> None:
    assert main(["merge", "merge.yml", *flags]) == code
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "merge.yml", "texts.txt"]
