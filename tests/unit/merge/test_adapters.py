"""Adapters against what PEFT makes of them (tests/golden/merge/adapters), and against plain algebra in float64."""

import contextlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.merge.adapter_merge import merge_linear, merge_svd, write_adapter
from cabochon.merge.adapters import read_adapter
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.method import bind, merge
from cabochon.merge.rows import whole_of_rows
from cabochon.model.config import Gemma2Config
from cabochon.weights.names import from_hf

GOLDEN = Path(__file__).parents[2] / "golden" / "merge" / "adapters"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/adapter_config.json"))
WEIGHTS, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def _load():
    with safe_open(GOLDEN / "peft.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        described = {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            **json.loads(file.metadata()["config"]),
        }
    return tensors, Gemma2Config.from_hf(described)


TENSORS, CONFIG = _load()
BASE = {from_hf(name.removeprefix("base/")): t for name, t in TENSORS.items() if name.startswith("base/")}
Q = "layers.0.attention.q.weight"


def merged_by_peft(name):
    prefix = f"merged/{name}/"
    return {from_hf(key.removeprefix(prefix)): t for key, t in TENSORS.items() if key.startswith(prefix)}


def delta(adapter, name):
    """What an adapter adds to a matrix, float64."""
    if name not in adapter.deltas:
        return torch.zeros(BASE[name].shape, dtype=torch.float64)
    part = adapter.deltas[name]
    return part.scale * (part.b.double() @ part.a.double())


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_is_pefts(name):
    adapter, expected = read_adapter(GOLDEN / name, CONFIG), merged_by_peft(name)
    assert {key for key in BASE if adapter.touches(key)} == expected.keys()
    for key, tensor in BASE.items():
        result = adapter.apply(key, tensor)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected.get(key, tensor), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_any_pieces_are_those_of_the_whole(name):
    adapter = read_adapter(GOLDEN / name, CONFIG)
    for key, tensor in BASE.items():
        whole, make = adapter.apply(key, tensor.bfloat16()), adapter.rows(key, tensor.bfloat16())
        count = tensor.numel() // tensor.shape[-1]
        pieces = torch.cat([make(i, min(i + 5, count)) for i in range(0, count, 5)])
        torch.testing.assert_close(pieces.reshape(tensor.shape), whole, rtol=1e-6, atol=1e-7)


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


def test_an_embedding_is_told_to_be_the_head_as_well():
    assert "head" in read_adapter(GOLDEN / "embedding", CONFIG).notes[0]
    assert not read_adapter(GOLDEN / "plain", CONFIG).notes


# Adapters merged with each other


def test_linear_is_the_exact_sum():
    adapters = [read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "second", "rslora", "patterns")]
    weights = [0.5, -1.25, 2.0, 0.75]
    result = merge_linear(adapters, weights)
    assert result.lost == 0
    assert result.factors[Q][0].shape[0] == 3 + 2 + 4 + 2
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
    result = merge_svd(adapters, weights, rank)
    energy = lost = 0.0
    for name in result.factors:
        expected = sum(w * delta(a, name) for w, a in zip(weights, adapters, strict=True))
        u, values, v = torch.linalg.svd(expected, full_matrices=False)
        best = u[:, :rank] * values[:rank] @ v[:rank]
        assert len(result.factors[name][0]) <= rank
        torch.testing.assert_close(result.delta(name).double(), best, rtol=1e-5, atol=1e-6)
        energy += float(values.square().sum())
        lost += float(values[rank:].square().sum())
    assert result.lost == pytest.approx(lost / energy, abs=1e-9)


def test_svd_of_opposite_adapters_is_nothing():
    plain = read_adapter(GOLDEN / "plain", CONFIG)
    result = merge_svd([plain, plain], [1.0, -1.0], 2)
    assert all(result.delta(name).abs().max() < 1e-6 for name in result.factors)


@pytest.mark.parametrize(
    "names", [["plain", "second"], ["layers", "plain"], ["embedding", "regex"], ["rslora"]], ids=str
)
@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_written_is_read_again(names, rank, tmp_path):
    adapters = [read_adapter(GOLDEN / name, CONFIG) for name in names if name != "embedding"]
    weights = [0.5 + i for i in range(len(adapters))]
    result = merge_linear(adapters, weights) if rank is None else merge_svd(adapters, weights, rank)
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
        write_adapter(merge_linear([read_adapter(GOLDEN / name, CONFIG)], [1.0]), tmp_path / name, CONFIG)
        assert json.loads((tmp_path / name / CONFIG_FILE).read_text())["target_modules"] == expected


def test_only_an_adapter_is_replaced(tmp_path):
    (tmp_path / "home").write_text("dear")
    with pytest.raises(UsageError):
        write_adapter(merge_linear([read_adapter(GOLDEN / "plain", CONFIG)], [1.0]), tmp_path, CONFIG, overwrite=True)


def test_what_has_no_sum_is_refused():
    plain, dora, saved = (read_adapter(GOLDEN / name, CONFIG) for name in ("plain", "dora", "saved"))
    for other, told in ((dora, "DoRA"), (saved, "brings")):
        with pytest.raises(BadInput) as refused:
            merge_linear([plain, other], [1, 1])
        assert told in str(refused.value)
    with pytest.raises(UsageError):
        merge_linear([plain], [1, 2])
    with pytest.raises(UsageError):
        merge_svd([plain], [1], 0)


# Bad input


@pytest.fixture
def folder(tmp_path):
    """A copy of a good adapter, to be spoilt."""
    return shutil.copytree(GOLDEN / "plain", tmp_path / "adapter")


def change(folder, **settings):
    document = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(document | settings))


def refusal(folder):
    with pytest.raises(CabochonError) as refused:
        read_adapter(folder, CONFIG)
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 4}, "rank 4"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"r": 0}, "its r"),
        ({"r": "3"}, "its r"),
        ({"lora_alpha": True}, "its lora_alpha"),
        ({"target_modules": ["q_proj", "q_projj"]}, "did you mean q_proj"),
        ({"target_modules": ["q_proj"]}, "has tensors for"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "has no tensors for"),
        ({"target_modules": "all-linear"}, "has no tensors for"),
        ({"target_modules": "(a+)+b"}, "repeats groups"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": 3}, "list of names"),
        ({"layers_to_transform": [0]}, "has tensors for"),
        ({"layers_to_transform": "a"}, "layers_to_transform"),
        ({"rank_pattern": []}, None),
        ({"alpha_pattern": ["q"]}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "biases"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"use_bdlora": {"n": 2}}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"something_new": 1}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"init_lora_weights": "gaussian"}, None),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(folder, settings, told):
    change(folder, **settings)
    if told is None:
        assert read_adapter(folder, CONFIG).deltas
    else:
        assert told in str(refusal(folder))


def rename(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda t: t | {A: t[A][:, :-1].contiguous()}, "q_proj: lora_B @ lora_A is"),
        (lambda t: t | {A: t[A] * float("nan")}, "not a number"),
        (lambda t: t | {A: t[A].int()}, "holds I32"),
        (lambda t: {k: v for k, v in t.items() if k != A}, "lora_A.weight"),
        (lambda t: rename(t, "layers.1", "layers.7"), "not an embedding or linear layer"),
        (lambda t: rename(t, "model.model.layers.0.self_attn.q_proj", "model.lm_head"), "head alone"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(24, 12)}, "one matrix for both"),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(13)}, "the model's is [12]"),
        (lambda t: t | {"base_model.model.model.norm.bias": torch.zeros(12)}, "norm.bias"),
        (lambda t: {"base_model.model.model.norm.weight": torch.zeros(12)}, "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, spoil, told):
    save_file(spoil(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    assert told in str(refusal(folder))


def test_tensors_of_a_bare_body_and_of_old_versions_are_known(folder):
    save_file(rename(load_file(folder / WEIGHTS), "model.model.layers", "model.layers"), folder / WEIGHTS)
    assert read_adapter(folder, CONFIG).deltas.keys() == read_adapter(GOLDEN / "plain", CONFIG).deltas.keys()
    shutil.copytree(GOLDEN / "dora", folder, dirs_exist_ok=True)
    save_file(rename(load_file(folder / WEIGHTS), "magnitude_vector", "magnitude_vector.weight"), folder / WEIGHTS)
    expected = read_adapter(GOLDEN / "dora", CONFIG).apply(Q, BASE[Q])
    assert torch.equal(read_adapter(folder, CONFIG).apply(Q, BASE[Q]), expected)


def test_pickled_and_missing_files_are_told(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickled" in str(refusal(folder))
    (folder / "adapter_model.bin").unlink()
    assert isinstance(refusal(folder), MissingResource)
    assert isinstance(refusal(tmp_path / "nowhere"), MissingResource)


def test_another_model_is_refused():
    with pytest.raises(BadInput, match="no tensors for"):
        read_adapter(GOLDEN / "plain", Gemma2Config.preset("tiny"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(json.loads((GOLDEN / "plain" / CONFIG_FILE).read_text()))


@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=3))
def test_any_configuration_is_read_or_refused(settings):
    document = json.loads((GOLDEN / "plain" / CONFIG_FILE).read_text()) | settings
    with TemporaryDirectory() as folder:
        shutil.copytree(GOLDEN / "plain", folder, dirs_exist_ok=True)
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(document))
        with contextlib.suppress(CabochonError):
            read_adapter(Path(folder), CONFIG)
