"""Adapters merged with each other and with other models, against plain algebra in float64."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.base.errors import BadInput, UsageError
from cabochon.merge.adapter_merge import merge_adapters, write_adapter
from cabochon.merge.adapter_methods import COMBINATIONS, combine
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, filled, merge
from cabochon.merge.rows import whole_of_rows
from cabochon.weights.adapters import Delta, read_adapter
from stored_adapters import BASE, CONFIG, GOLDEN

Q = "layers.0.attention.q.weight"
CONFIG_FILE = "adapter_config.json"


def merged(adapters, weights, method="cat", seed=0, rank=None, **more):
    """Adapters merged with the same settings for every matrix; `more` of each adapter."""
    combination, shared = COMBINATIONS[method], {} if rank is None else {"rank": rank}
    own = [{"weight": weight, **more} for weight in weights]
    return merge_adapters(
        adapters,
        combination,
        lambda name, places: filled(
            method, combination.parameters, shared, [own[i] for i in places], seed=seed + len(name)
        ),
    )


def delta(adapter, name):
    """What an adapter adds to a matrix, float64."""
    if name not in adapter.deltas:
        return torch.zeros(BASE[name].shape, dtype=torch.float64)
    part = adapter.deltas[name]
    return part.scale * (part.b.double() @ part.a.double())


def test_methods_merge_adapted_models_without_making_them():
    plain, second = (read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "second"))
    method = METHODS["ties"]
    settings = bind(method, {}, [{"weight": 1.0, "density": 0.5}] * 2)
    base = BASE[Q]
    out, expected = torch.empty(base.shape), torch.empty(base.shape)
    whole = Whole((plain.apply(Q, base), second.apply(Q, base)), base)
    merge(method, whole, settings, expected)
    rows = whole_of_rows(base.shape, [plain.rows(Q, base), second.rows(Q, base)], lambda a, b: base[a:b])
    merge(method, rows, settings, out)
    assert torch.equal(out, expected)


# Adapters merged with each other


def test_cat_is_the_exact_sum():
    adapters = [read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "second", "rslora", "patterns")]
    weights = [0.5, -1.25, 2.0, 0.75]
    result = merged(adapters, weights)
    assert result.lost == 0
    assert len(result.factors[Q].a) == 3 + 2 + 4 + 2
    for name in BASE:
        expected = sum(w * delta(a, name) for w, a in zip(weights, adapters, strict=True))
        if name not in result.factors:
            assert not expected.any()
        else:
            torch.testing.assert_close(result.delta(name).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_svd_is_the_best_of_its_rank(rank):
    adapters = [read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "second", "rslora")]
    weights = [0.5, 1.0, 2.0]
    result = merged(adapters, weights, "svd", rank=rank)
    energy = lost = 0.0
    for name in result.factors:
        expected = sum(w * delta(a, name) for w, a in zip(weights, adapters, strict=True))
        u, values, v = torch.linalg.svd(expected, full_matrices=False)
        best = u[:, :rank] * values[:rank] @ v[:rank]
        assert len(result.factors[name].a) <= rank
        torch.testing.assert_close(result.delta(name).double(), best, rtol=1e-5, atol=1e-6)
        energy += float(values.square().sum())
        lost += float(values[rank:].square().sum())
    assert result.lost == pytest.approx(lost / energy, abs=1e-9)


def test_svd_of_opposite_adapters_is_nothing():
    plain = read_adapter(GOLDEN / "plain", CONFIG)
    result = merged([plain, plain], [1.0, -1.0], "svd", rank=2)
    assert all(result.delta(name).abs().max() < 1e-6 for name in result.factors)


@pytest.mark.parametrize(
    "names", [["plain", "second"], ["layers", "plain"], ["embedding", "regex"], ["rslora"]], ids=str
)
@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_written_is_read_again(names, rank, tmp_path):
    adapters = [read_adapter(GOLDEN / name, CONFIG) for name in names if name != "embedding"]
    weights = [0.5 + i for i in range(len(adapters))]
    result = merged(adapters, weights, "cat" if rank is None else "svd", rank=rank)
    write_adapter(result, tmp_path / "out", CONFIG)
    again = read_adapter(tmp_path / "out", CONFIG)
    assert again.deltas.keys() == result.factors.keys()
    for name in result.factors:
        torch.testing.assert_close(delta(again, name), result.delta(name).double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError):
        write_adapter(result, tmp_path / "out", CONFIG)
    write_adapter(result, tmp_path / "out", CONFIG, overwrite=True)


def test_targets_are_written_as_short_as_they_can_be(tmp_path):
    for name, expected in (
        ("plain", ["q_proj", "v_proj"]),
        ("layers", [f"model.layers.1.self_attn.{p}_proj" for p in "qv"]),
    ):
        write_adapter(merged([read_adapter(GOLDEN / name, CONFIG)], [1.0]), tmp_path / name, CONFIG)
        assert json.loads((tmp_path / name / CONFIG_FILE).read_text())["target_modules"] == expected


def test_only_an_adapter_is_replaced(tmp_path):
    (tmp_path / "home").write_text("dear")
    with pytest.raises(UsageError):
        write_adapter(merged([read_adapter(GOLDEN / "plain", CONFIG)], [1.0]), tmp_path, CONFIG, overwrite=True)


def test_what_has_no_sum_is_refused():
    plain, dora, saved = (read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "dora", "saved"))
    for other, told in ((dora, "DoRA"), (saved, "brings")):
        with pytest.raises(BadInput) as refused:
            merged([plain, other], [1, 1])
        assert told in str(refused.value)
    with pytest.raises(BadInput, match="rank of svd cannot be 0"):
        merged([plain], [1], "svd", rank=0)
    with pytest.raises(BadInput, match="ties needs weight"):
        combine([plain.deltas[Q]], COMBINATIONS["ties"], filled("ties", COMBINATIONS["ties"].parameters, {}, [{}]))


seeds = st.integers(0, 2**32)


def random_deltas(seed, count, n, k, rank):
    draw = torch.Generator().manual_seed(seed)
    return [
        Delta(torch.randn(rank, k, generator=draw), torch.randn(n, rank, generator=draw), 0.5 + i) for i in range(count)
    ]


def combined(deltas, method, seed=0, majority="total", rank=None, **more):
    combination = COMBINATIONS[method]
    own = [{"weight": 0.5 - 0.3 * i, **more} for i in range(len(deltas))]
    shared = {} if rank is None else {"rank": rank}
    result = combine(
        deltas, combination, filled(method, combination.parameters, shared, own, seed=seed), majority=majority
    )
    return result.b.double() @ result.a.double()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 9), k=st.integers(1, 9), rank=st.integers(1, 4), wanted=st.integers(1, 5))
def test_cut_sums_of_any_shape_are_the_best_of_their_rank(seed, n, k, rank, wanted):
    deltas = random_deltas(seed, 3, n, k, rank)
    total = sum((0.5 - 0.3 * i) * d.scale * d.b.double() @ d.a.double() for i, d in enumerate(deltas))
    u, values, v = torch.linalg.svd(total, full_matrices=False)
    best = u[:, :wanted] * values[:wanted] @ v[:wanted]
    torch.testing.assert_close(combined(deltas, "cat"), total, rtol=1e-5, atol=1e-5)
    if len(values) > wanted and values[wanted - 1] < values[wanted] * 1.01:
        return  # which of two equal directions is kept is open
    for method in ("svd", "magnitude_prune_svd", "dare_linear_svd"):  # the last two keep everything
        torch.testing.assert_close(combined(deltas, method, rank=wanted), best, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, method=st.sampled_from(["magnitude_prune", "dare_linear"]))
def test_what_keeps_everything_is_linear(seed, method):
    deltas = random_deltas(seed, 3, 6, 5, 2)
    assert torch.equal(combined(deltas, method), combined(deltas, "linear"))
    assert not combined(deltas, method, density=0.0).any()


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "cat", "svd", "ties_svd"])
def test_one_adapter_is_itself(method):
    (one,) = random_deltas(1, 1, 6, 5, 2)
    torch.testing.assert_close(
        combined([one], method), 0.5 * one.scale * one.b.double() @ one.a.double(), rtol=1e-5, atol=1e-5
    )


def test_the_mean_over_seeds_is_what_nothing_was_dropped_of():
    deltas = random_deltas(3, 2, 8, 7, 2)
    runs = 600
    total = sum(combined(deltas, "dare_linear", seed=seed, density=0.6) for seed in range(runs)) / runs
    expected = combined(deltas, "linear")
    assert (total - expected).abs().max() < 0.15 * expected.abs().max()
    assert (total - expected).mean().abs() < 0.02 * expected.abs().mean()
    assert torch.equal(*(combined(deltas, "dare_linear", seed=7, density=0.6) for _ in range(2)))
