import math
from typing import Any

import pytest
import torch
from trials import PARAMETERS, model_count, normal, random_run, run

from cabochon.base.errors import BadInput
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.method import Parameter, bind, tensor_seed

TIES = METHODS["ties"]


def test_the_table_is_by_name_and_every_method_says_where_it_comes_from() -> None:
    assert all(name == method.name and method.source for name, method in METHODS.items())
    assert METHODS.keys() == PARAMETERS.keys()


def test_defaults_and_values_are_filled_in() -> None:
    settings = bind(TIES, {"weight": 1, "normalize": False}, [{}, {"weight": 0.5, "density": 0.25}], seed=7)
    assert settings.shared == {"normalize": False, "rescale": False, "lambda": 1.0, "int8_mask": False}
    assert settings.per_model == {"weight": (1.0, 0.5), "density": (1.0, 0.25)}
    assert (settings.method, settings.models, settings.seed) == ("ties", 2, 7)


def test_what_has_no_default_may_be_none_only_where_none_is_the_default() -> None:
    assert bind(METHODS["passthrough"], {}, [{"scale": None}]).per_model["scale"] == (None,)
    with pytest.raises(BadInput, match="weight"):
        bind(TIES, {}, [{"weight": None}])


@pytest.mark.parametrize(
    ("method", "shared", "words"),
    [
        ("ties", {}, "ties needs weight for every model"),
        ("slerp", {}, "slerp needs t"),
        ("ties", {"weight": 1, "density": 1.5}, "from 0 to 1"),
        ("ties", {"weight": 1, "density": -0.1}, "density of ties cannot be -0.1"),
        ("ties", {"weight": "1"}, "a number"),
        ("ties", {"weight": True}, "a number"),
        ("ties", {"weight": math.nan}, "a number"),
        ("ties", {"weight": 1, "normalize": 1}, "true or false"),
        ("ties", {"weight": 1, "densty": 1}, "did you mean density"),
        ("ties", {"weight": 1, "gamma": 0.1}, "no parameter gamma"),
        ("karcher", {"max_iter": 2.5}, "a whole number of at least 0"),
        ("model_stock", {"zzz": 1}, "it has: filter_wise"),
        ("warp_slerp", {"eta": 1}, "no parameters"),
    ],
)
def test_a_wrong_parameter_is_named(method: str, shared: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        bind(METHODS[method], shared, [{}] * model_count(method))


@pytest.mark.parametrize(
    ("method", "count", "words"),
    [
        ("slerp", 2, "cannot merge 2 models beside the base"),
        ("nuslerp", 3, "exactly 2"),
        ("model_stock", 1, "at least 2"),
        ("passthrough", 2, "exactly 1"),
        ("linear", 0, "cannot merge 0 models"),
    ],
)
def test_a_wrong_number_of_models_is_named(method: str, count: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        bind(METHODS[method], PARAMETERS[method], [{}] * count)


def test_a_rule_is_said_in_words() -> None:
    assert Parameter("x").rule == "a number"
    assert Parameter("x", low=0).rule == "a number of at least 0"
    assert Parameter("x", int, low=0, high=9).rule == "a whole number from 0 to 9"


def test_a_missing_and_a_useless_base_are_named() -> None:
    with pytest.raises(BadInput, match="ties needs a base model"):
        run("ties", [torch.ones(2)], weight=1)
    with pytest.raises(BadInput, match="karcher knows no base model"):
        run("karcher", [torch.ones(2)], torch.ones(2))


def test_an_empty_tensor_stays_empty() -> None:
    assert run("ties", [torch.empty(0, 3)], torch.empty(0, 3), weight=1).shape == (0, 3)
    assert run("slerp", [torch.empty(3, 0)], torch.empty(3, 0), t=0.5).shape == (3, 0)


def test_seeds_differ_by_tensor_and_seed_and_are_always_the_same() -> None:
    seeds = {tensor_seed(seed, name) for seed in (0, 1) for name in ("a", "b", "1 a")}
    assert len(seeds) == 6
    assert tensor_seed(0, "model.norm.weight") == 9449124479133195694


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_marked_random_depend_on_the_seed(method: str) -> None:
    base = None if METHODS[method].base == "none" else normal(0, (8, 16))
    models = [normal(1 + i, (8, 16)) for i in range(model_count(method))]
    one, two = (run(method, models, base, seed=seed, **PARAMETERS[method]) for seed in (1, 2))
    assert torch.equal(one, two) != METHODS[method].random
    assert torch.equal(one, run(method, models, base, seed=1, **PARAMETERS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, -1])
def test_values_that_are_not_finite_are_refused(method: str, bad: float, where: int) -> None:
    """In any model or the base; a NaN must not vanish behind a mask either."""
    base = None if METHODS[method].base == "none" else normal(0, (8, 16))
    models = [normal(1 + i, (8, 16)) for i in range(model_count(method))]
    tensors = [*models, *([base] if base is not None else [])]
    tensors[where][3, 5] = bad
    whose = "the base model" if where == -1 and base is not None else f"model {where % len(tensors) + 1}"
    with pytest.raises(BadInput, match=f"{whose} cannot be merged\n  cause: it holds (NaN|infinity)"):
        run(method, models, base, **PARAMETERS[method])


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are(method: str) -> None:
    base = None if METHODS[method].base == "none" else normal(0, (8, 16))
    models = [normal(1 + i, (8, 16)) for i in range(model_count(method))]
    before = [t.clone() for t in (*models, *([base] if base is not None else []))]
    run(method, models, base, **PARAMETERS[method])
    after = [*models, *([base] if base is not None else [])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_models_that_equal_the_base_leave_it(method: str) -> None:
    if method in ("linear", "passthrough", "multislerp"):  # weighted sums of 0.7 and 0.5
        return
    same = normal(0, (8, 16))
    base = None if METHODS[method].base == "none" else same
    got = run(method, [same.clone() for _ in range(model_count(method))], base, **PARAMETERS[method])
    torch.testing.assert_close(got, same)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_merged_in_float32(method: str) -> None:
    exact = random_run(method, 3, (8, 16), torch.bfloat16)
    base = None if METHODS[method].base == "none" else normal(3, (8, 16)).bfloat16()
    models = [normal(4 + i, (8, 16)).bfloat16() for i in range(model_count(method))]
    rounded = run(method, models, base, seed=3, dtype=torch.bfloat16, **PARAMETERS[method])
    assert torch.equal(rounded, exact.bfloat16())
