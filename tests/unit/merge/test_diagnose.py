"""Diagnoses against plain algebra in float64, and what WARP (arXiv 2406.16768) found about fine-tuned models."""

import io
import json
import math
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from cabochon.base.errors import BadInput, UsageError
from cabochon.merge.diagnose import diagnose, measure, place
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge
from cabochon.merge.show import MEASURES, heat, table

NAMES = ["embedding.weight", "layers.0.attention.q.weight", "layers.0.mlp.up.weight", "layers.1.attention.q.weight",
         "layers.1.mlp.up.weight", "final_norm.weight"]  # fmt: skip


def trio(dtype=torch.float32, noise=0.1):
    """A base and two models, by names of tensors."""
    draw = torch.Generator().manual_seed(7)
    shapes = [(20, 12) if name != "final_norm.weight" else (12,) for name in NAMES]
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    models = {
        m: {n: (t.float() + noise * torch.randn(t.shape, generator=draw)).to(dtype) for n, t in base.items()}
        for m in "ab"
    }
    return base, models


def flat(tensors, names=NAMES):
    return torch.cat([tensors[name].double().flatten() for name in names])


def degrees(a, b):
    return math.degrees(math.acos(float(torch.dot(a, b) / a.norm() / b.norm())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_and_angles_are_those_of_the_vectors(dtype):
    base, models = trio(dtype)
    found = diagnose(base, models)
    groups = {None: (NAMES, found.total), "kind": ([n for n in NAMES if "mlp.up" in n], found.kinds["mlp.up"])}
    groups["layer"] = ([n for n in NAMES if n.startswith("layers.1.")], found.layers[1])
    groups |= {name: ([name], found.tensors[name]) for name in NAMES}
    for names, measured in groups.values():
        origin, a, b = flat(base, names), flat(models["a"], names), flat(models["b"], names)
        assert measured.elements == len(origin)
        assert measured.base_norm == pytest.approx(float(origin.norm()))
        assert measured.norms == pytest.approx([float((a - origin).norm()), float((b - origin).norm())])
        assert measured.relative_norms[0] == pytest.approx(float((a - origin).norm() / origin.norm()))
        assert measured.angles == pytest.approx([degrees(a - origin, b - origin)])
        assert measured.weight_angles == pytest.approx([degrees(a, b)])


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_clashes_are_what_ties_settles(density):
    base, models = trio()
    whole = Whole(tuple(models[m][NAMES[1]] for m in "ab"), base[NAMES[1]])
    measured = measure(whole, density)
    a, b = ((models[m][NAMES[1]] - base[NAMES[1]]).flatten() for m in "ab")
    for values in (a, b):
        values[values.abs().argsort(descending=True)[int(density * len(values)) :]] = 0
    clash = a * b < 0
    assert measured.touched == int(((a != 0) | (b != 0)).sum())
    assert measured.clashing == int(clash.sum())
    assert measured.clash_share == pytest.approx(float(clash.sum() / ((a != 0) | (b != 0)).sum()))
    assert measured.mass == pytest.approx(float(a.abs().sum() + b.abs().sum()), rel=1e-6)
    assert measured.outvoted == pytest.approx(float(torch.minimum(a.abs(), b.abs())[clash].sum()), rel=1e-5)
    # What TIES keeps of three task vectors is what was not outvoted.
    third = base[NAMES[1]] + 0.3 * torch.randn(20, 12, generator=torch.Generator().manual_seed(9))
    whole = Whole((*whole.tensors, third), whole.base)
    measured = measure(whole, density)
    out = torch.empty(20, 12)
    settings = bind(METHODS["ties"], {"normalize": False}, [{"weight": 1.0, "density": density}] * 3)
    merge(METHODS["ties"], whole, settings, out)
    assert float((out - whole.base).abs().sum()) == pytest.approx(measured.mass - measured.outvoted, rel=1e-5)


def test_threads_change_no_bit(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("cabochon.merge.diagnose.MEASURED_BLOCK", 24)
    base, models = trio()
    with ThreadPoolExecutor(3) as pool:
        assert diagnose(base, models, run=pool.map) == diagnose(base, models)


def test_a_model_that_is_the_base_has_no_angle():
    base, models = trio()
    found = diagnose(base, {"a": models["a"], "same": base, "b": models["b"]})
    assert found.pairs == [("a", "same"), ("a", "b"), ("same", "b")]
    assert [angle is None for angle in found.total.angles] == [True, False, True]
    assert found.total.norms[1] == 0
    json.dumps(found.to_json(), allow_nan=False)
    assert "-" in printed(diagnose(base, {"same": base}))


def test_opposite_task_vectors_clash_everywhere():
    base, models = trio()
    opposite = {name: 2 * tensor - models["a"][name] for name, tensor in base.items()}
    total = diagnose(base, {"a": models["a"], "opposite": opposite}).total
    assert total.angles[0] == pytest.approx(180, abs=1e-3)
    assert total.clash_share == 1
    assert total.outvoted_share == pytest.approx(0.5, abs=1e-6)


def test_tensors_are_asked_for_one_by_one():
    base, models = trio()
    gone = []
    diagnose(base, models, done=gone.append)
    assert gone == NAMES


def test_input_that_cannot_be_compared_is_refused():
    base, models = trio()
    with pytest.raises(BadInput, match="nothing to compare"):
        diagnose(base, {})
    with pytest.raises(BadInput, match=r"has no final_norm\.weight"):
        diagnose(base, {"a": {n: t for n, t in models["a"].items() if n != NAMES[-1]}})
    with pytest.raises(BadInput, match="different shapes"):
        diagnose(base, {"a": models["a"] | {NAMES[0]: torch.zeros(21, 12)}})
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.up\.weight of b"):
        diagnose(base, models | {"b": models["b"] | {NAMES[2]: torch.full((20, 12), torch.nan)}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("layers.12.mlp.up.weight", (12, "mlp.up")), ("final_norm.weight", (None, "final_norm"))],
)
def test_places(name, expected):
    assert place(name) == expected


# Shown


def printed(found, by="kind"):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(found, by))
    return console.file.getvalue()


def test_the_table_has_a_row_for_each_group():
    base, models = trio()
    found = diagnose(base, models, density=0.5)
    text = printed(found)
    assert all(kind in text for kind in ("embedding", "attention.q", "mlp.up", "final_norm", "all"))
    assert "density 0.5" in text
    assert f"{found.total.angles[0]:.2f}\u00b0" in text
    third = diagnose(base, models | {"c": models["a"]})
    assert " to " in printed(third, "layer")


@pytest.mark.parametrize("name", MEASURES)
def test_heat_maps_have_a_cell_for_every_layer_and_kind(name):
    base, models = trio()
    root = ElementTree.fromstring(heat(diagnose(base, models), name))
    tips = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert [tip.split(":")[0] for tip in tips] == [f"layer {n}, {k}" for n in (0, 1) for k in ("attention.q", "mlp.up")]


def test_an_unknown_measure_is_refused():
    base, models = trio()
    with pytest.raises(UsageError, match="did you mean angle"):
        heat(diagnose(base, models), "angel")


# WARP, section 3.2 and its figure of angles


def tuned(noise):
    """Two models from one start, as two runs of training that learned independent things: [2, ...] and the start."""
    draw = torch.Generator().manual_seed(2406)
    start = torch.randn(400, 300, generator=draw)
    return [start + noise * torch.randn(400, 300, generator=draw) for _ in range(2)], start


@pytest.mark.parametrize("noise", [0.01, 0.03])  # below and above mergekit's bound for interpolating linearly
def test_whole_weights_are_collinear_and_task_vectors_at_right_angles(noise):
    (a, b), start = tuned(noise)
    measured = measure(Whole((a, b), start))
    assert math.cos(math.radians(measured.weight_angles[0])) > 0.999
    assert measured.angles[0] == pytest.approx(90, abs=1)
    assert measured.clash_share == pytest.approx(0.5, abs=0.01)

    linear, whole, vectors = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
    merge(METHODS["linear"], Whole((a, b)), bind(METHODS["linear"], {}, [{"weight": 0.5}] * 2), linear)
    merge(METHODS["slerp"], Whole((b,), a), bind(METHODS["slerp"], {"t": 0.5}, [{}]), whole)
    merge(METHODS["warp_slerp"], Whole((a, b), start), bind(METHODS["warp_slerp"], {}, [{}] * 2), vectors)
    length = sum(measured.norms) / 2
    # SLERP of whole weights is LERP: the difference is lost beside what was learned, and so is the length of that.
    assert float((whole - linear).norm()) < 0.02 * length
    assert float((whole - start).norm()) == pytest.approx(length / math.sqrt(2), rel=0.02)
    # SLERP of task vectors is not, and keeps the length.
    assert float((vectors - linear).norm()) > 0.25 * length
    assert float((vectors - start).norm()) == pytest.approx(length, rel=0.01)
    # It goes the same way as LERP, only further.
    assert degrees((vectors - start).double().flatten(), (linear - start).double().flatten()) < 0.5
