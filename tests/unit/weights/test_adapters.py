"""Adapters on the way in and out, against what PEFT makes of them (tests/golden/merge/adapters)."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraConfig, adapter_parameters, adapters, attach, merge, put
from cabochon.weights.adapters import load_adapter, read_adapter, save_adapter
from cabochon.weights.folder import load_model
from cabochon.weights.quantize import quantize_folder
from cabochon.weights.save import save_model
from cabochon.weights.scheme import Scheme
from stored_adapters import BASE, CONFIG, GOLDEN, NAMES, merged_by_peft
from support import SMALL, random_ids, small_model

Q = "layers.0.attention.q.weight"
WEIGHTS, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


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


def test_an_embedding_is_told_to_be_the_head_as_well():
    assert "head" in read_adapter(GOLDEN / "embedding", CONFIG).notes[0]
    assert not read_adapter(GOLDEN / "plain", CONFIG).notes


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


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=3))
def test_any_configuration_is_read_or_refused(changes):
    document = json.loads((GOLDEN / "plain" / CONFIG_FILE).read_text()) | changes
    with TemporaryDirectory() as folder:
        shutil.copytree(GOLDEN / "plain", folder, dirs_exist_ok=True)
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(document))
        with contextlib.suppress(CabochonError):
            read_adapter(Path(folder), CONFIG)


# Written


def adapted_model(**settings):
    model = small_model()
    attach(model, LoraConfig(rank=2, **settings))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


IDS = random_ids(SMALL, 2, 9)


def test_what_is_saved_is_loaded(tmp_path):
    model = adapted_model(dora=True, rslora=True, alpha=2.5, dropout=0.25, targets=("k", "gate"))
    save_adapter(model, tmp_path / "out", base_model_name="google/gemma-2-2b")
    document = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 2.5,
        "lora_dropout": 0.25,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["gate_proj", "k_proj"],
        "base_model_name_or_path": "google/gemma-2-2b",
        "rank_pattern": {},
    }
    assert document | expected == document
    again = small_model()
    load_adapter(again, tmp_path / "out")
    assert torch.equal(again(IDS), model(IDS))
    layer = adapters(again)["layers.0.mlp.gate"]
    assert (layer.alpha, layer.rslora, layer.dropout) == (2.5, True, 0.25)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == adapter_parameters(again).keys()


def test_layers_of_different_ranks_are_saved(tmp_path):
    model = small_model()
    for number, name in enumerate(["layers.0.attention.q", "layers.1.attention.q", "layers.2.mlp.down"]):
        rows, columns = model.get_submodule(name).weight.shape
        put(model, name, torch.randn(number + 1, columns), torch.randn(rows, number + 1), alpha=number + 0.5)
    save_adapter(model, tmp_path / "out", base_model_name=None)
    again = small_model()
    load_adapter(again, tmp_path / "out")
    assert torch.equal(again(IDS), model(IDS))


def test_nothing_is_overwritten_by_accident(tmp_path):
    model = adapted_model()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            save_adapter(model, tmp_path / "home", base_model_name=None, overwrite=overwrite)
    save_adapter(model, tmp_path / "out", base_model_name=None)
    with pytest.raises(UsageError, match="not empty"):
        save_adapter(model, tmp_path / "out", base_model_name=None)
    save_adapter(model, tmp_path / "out", base_model_name=None, overwrite=True)
    with pytest.raises(UsageError, match="no adapters"):
        save_adapter(small_model(), tmp_path / "none", base_model_name=None)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "out"}


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = adapted_model()
    save_adapter(model, tmp_path / "out", base_model_name=None)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cabochon.weights.adapter_save.write_safetensors", full)
    with pytest.raises(MissingResource, match="No space left"):
        save_adapter(model, tmp_path / "out", base_model_name=None, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Put beside a model, or into its weights


@pytest.mark.parametrize("name", ["embedding", "saved"])
def test_more_than_linear_layers_cannot_be_trained_on(name):
    with pytest.raises(BadInput, match="embed_tokens") as refused:
        load_adapter(Gemma2(CONFIG), GOLDEN / name)
    assert "load(adapter=...)" in refused.value.hint


def test_an_adapter_for_another_model_is_refused_with_its_name(tmp_path):
    save_adapter(adapted_model(), tmp_path / "out", base_model_name="google/gemma-2-2b")
    wider = small_model(dataclasses.replace(SMALL, intermediate_size=80))
    with pytest.raises(BadInput, match="rank 2 and the matrix ask for") as refused:
        load_adapter(wider, tmp_path / "out")
    assert "google/gemma-2-2b" in refused.value.hint
    assert not adapters(wider)
    model = adapted_model()
    with pytest.raises(UsageError, match="has adapters already"):
        load_adapter(model, tmp_path / "out")


@pytest.fixture
def base(tmp_path):
    """PEFT's base as a folder."""
    model = Gemma2(CONFIG)
    model.load_state_dict(BASE)
    save_model(model, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", NAMES)
def test_loading_with_an_adapter_is_loading_what_peft_merged(name, base, tmp_path):
    model = load_model(base, adapter=GOLDEN / name)
    for key, expected in (BASE | merged_by_peft(name)).items():
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-6, atol=1e-6)
    save_model(model, tmp_path / "merged")
    for form in ("bf16", "int8", "int4"):
        ours = load_model(base, adapter=GOLDEN / name, weights=form).state_dict()
        for key, expected in load_model(tmp_path / "merged", weights=form).state_dict().items():
            assert torch.equal(ours[key], expected)


@pytest.mark.parametrize("name", ["dora", "embedding"])  # an embedding has enough rows for two pieces
def test_pieces_of_rows_make_no_difference(name, base, monkeypatch):
    whole = load_model(base, adapter=GOLDEN / name).state_dict()
    monkeypatch.setattr("cabochon.weights.adapted.PIECE", 1)
    for key, values in load_model(base, adapter=GOLDEN / name).state_dict().items():
        torch.testing.assert_close(values, whole[key], rtol=1e-6, atol=1e-6)


def test_lossless_weights_hold_an_adapted_model(base, tmp_path):
    save_model(load_model(base), tmp_path / "bf16", dtype=torch.bfloat16)
    expected = load_model(tmp_path / "bf16", adapter=GOLDEN / "plain")
    packed = load_model(tmp_path / "bf16", adapter=GOLDEN / "plain", weights="lossless")
    layer = packed.layers[0].attention.q
    assert torch.equal(layer.unpacked(torch.arange(layer.rows)), expected.layers[0].attention.q.weight)


def test_an_adapter_goes_on_weights_of_bitsandbytes(tmp_path):
    folder = GOLDEN.parents[1] / "bitsandbytes" / "nf4"
    model = load_model(folder, dtype=torch.float32)
    attach(model, LoraConfig(rank=2, targets=("q", "down")))
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.b.add_(0.1)
    save_adapter(model, tmp_path / "out", base_model_name=None)
    expected = load_model(folder, dtype=torch.float32)
    load_adapter(expected, tmp_path / "out")
    merge(expected)
    ours = load_model(folder, dtype=torch.float32, adapter=tmp_path / "out").state_dict()
    for key, values in expected.state_dict().items():
        torch.testing.assert_close(ours[key], values, rtol=1e-6, atol=1e-6)


def test_no_adapter_goes_on_quantised_weights(base, tmp_path):
    quantize_folder(base, tmp_path / "int8", Scheme(8))
    with pytest.raises(UsageError, match="weights are quantised"):
        load_model(tmp_path / "int8", adapter=GOLDEN / "plain")


def test_values_that_overflow_are_found(base, tmp_path):
    folder = shutil.copytree(GOLDEN / "plain", tmp_path / "adapter")
    save_file({name: tensor * 1e30 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(BadInput, match="with the adapter has values that are infinite"):
        load_model(base, adapter=folder)
