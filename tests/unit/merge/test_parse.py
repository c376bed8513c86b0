"""mergekit's YAML: what is read, and what is said about what cannot be."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.base.errors import BadInput
from cabochon.merge.config import Filtered, ModelRef, TokenChoice, evaluate, lookup
from cabochon.merge.parse import parse_config

LINEAR = """
models:
  - model: a
    parameters: {weight: 0.3}
  - model: b@main+lora@v2
    parameters: {weight: [0.1, 0.9]}
merge_method: linear
dtype: bfloat16
"""


def test_models() -> None:
    config = parse_config(LINEAR)
    assert config.method == "linear" and config.dtype == "bfloat16" and config.text == LINEAR
    assert config.models() == (ModelRef("a"), ModelRef("b", "main", "lora", "v2"))
    (part,) = config.slices
    assert [source.parameters["weight"] for source in part.sources] == [0.3, (0.1, 0.9)]


def test_slices_filters_and_a_tokenizer() -> None:
    config = parse_config("""
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: {model: {path: b, revision: r}, lora: c}, layer_range: [1, 3]}
    parameters: {t: [{filter: mlp, value: [0, 1e-1]}, {value: 0.5}]}
merge_method: slerp
base_model: a
tokenizer:
  source: union
  tokens: {x: {source: a, force: true}, y: {source: {kind: zero}}}
  pad_to_multiple_of: 64
parameters: {t: 1}
""")
    (part,) = config.slices
    assert part.sources[1].layers == (1, 3) and part.sources[1].model == ModelRef("b", "r", "c")
    assert part.parameters["t"] == (Filtered((0, 0.1), "mlp"), Filtered(0.5))
    assert config.tokenizer is not None and config.tokenizer.pad_to_multiple_of == 64
    assert config.tokenizer.tokens == {"x": TokenChoice(ModelRef("a"), force=True), "y": TokenChoice(None)}


def test_modules_are_slices_below_a_name() -> None:
    config = parse_config("""
modules:
  default:
    parameters: {weight: 2}
    models: [{model: a}]
merge_method: linear
parameters: {weight: 1}
""")
    assert config.module_parameters == {"weight": 2} and config.parameters == {"weight": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: linear", "exactly one of models, slices and modules"),
        (LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]", "models and slices"),
        (LINEAR + "base_modle: a", "did you mean base_model?"),
        (LINEAR.replace("weight: 0.3", "weight: much"), "models[0].parameters.weight"),
        (LINEAR.replace("weight: 0.3", "weight: .nan"), "not a number"),
        (LINEAR.replace("bfloat16", "int8"), "choose bfloat16"),
        (LINEAR.replace("model: a", "model: a+b+c"), "too many + or @"),
        (LINEAR.replace("model: a", "model: !!python/object/apply:os.system ['true']"), "constructor"),
        (LINEAR + "dtype: float32", "'dtype' is there twice"),
        ("slices: [{sources: [{model: a, layer_range: [2, 1]}]}]\nmerge_method: linear", "no layers from 2 to 1"),
        ("slices: [{sources: [{model: a}]}]\nmerge_method: linear", "layer_range"),
        ("[1, 2]", "not a mapping"),
        ("a: [", "line"),
        ("models: &a [*a]\nmerge_method: linear", "not a mapping"),
        (LINEAR + "tokenizer_source: base\ntokenizer: {source: base}", "leave one of them out"),
        (LINEAR + "---\n" + LINEAR, "another document"),
        (LINEAR.replace("weight: 0.3", "weight: " + "9" * 400), "not a number"),
        (LINEAR.replace("weight: 0.3", "weight: " + "9" * 5000), "digits"),
        (LINEAR.replace("weight: 0.3", "weight: 2001-13-45"), "month"),
        (LINEAR.replace("model: a", "model: +lora"), "leaves out a path"),
        (LINEAR.replace("model: a", "model: a+"), "leaves out a path"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: 5}}}}", "one token"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}", "one token"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_config(text, "my.yml")
    assert said in str(caught.value) and "my.yml" in caught.value.what


def test_a_mapping_that_takes_in_another_may_repeat_its_keys() -> None:
    text = (
        LINEAR.replace("{weight: 0.3}", "&a {<<: &b {weight: 0.3}, weight: 0.5}") + "parameters: {<<: *a, weight: 2}\n"
    )
    config = parse_config(text)
    assert config.slices[0].sources[0].parameters == {"weight": 0.5} and config.parameters == {"weight": 2}


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadInput):
        parse_config(text)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_values_and_meets_its_ends(values: list[float], depth: float) -> None:
    setting = tuple(values)
    got = evaluate(setting, "any", depth)
    assert got is not None and min(values) - 1e-9 <= got <= max(values) + 1e-9
    assert evaluate(setting, "any", 0.0) == values[0] and evaluate(setting, "any", 1.0) == values[-1]


def test_the_first_filter_that_fits_counts_and_the_first_level_that_has_a_value() -> None:
    setting = (Filtered(1.0, "mlp"), Filtered((0.0, 2.0), "attn"))
    assert evaluate(setting, "model.layers.0.mlp.up_proj.weight", 0.5) == 1.0
    assert evaluate(setting, "model.layers.0.self_attn.q_proj.weight", 0.5) == 1.0
    assert evaluate(setting, "model.norm.weight", 0.5) is None
    assert lookup(({"t": setting}, {}, {"t": 7.0}), "t", "model.norm.weight", 0.0) == 7.0
    assert evaluate((True, False), "any", 0.4) is True
