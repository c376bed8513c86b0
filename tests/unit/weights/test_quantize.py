"""Quantised folders: written tensor by tensor, mapped back as they are, and checked as strictly as float ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import change_json, change_tensors, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import PackedWeight, QuantEmbedding, QuantLinear, quantize
from cabochon.model.lora import LoraConfig, attach, detach, merge
from cabochon.weights import fit
from cabochon.weights.folder import describe, load_model, save_model
from cabochon.weights.init import init_folder
from cabochon.weights.names import from_hf, to_hf
from cabochon.weights.quantize import quantize_folder, quantize_layers, use_packed_layers
from cabochon.weights.save import scheme_of
from cabochon.weights.scheme import GROUPS, Scheme, layout, read_scheme
from support import SMALL, configs, random_ids, relative_error

SCHEMES = [Scheme(8), Scheme(4), Scheme(8, 32), Scheme(4, 128), Scheme(4, 64, "rtn", 8)]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def values(model: Gemma2) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(first: Gemma2, second: Gemma2) -> bool:
    ours, theirs = values(first), values(second)
    return list(ours) == list(theirs) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours.values(), theirs.values(), strict=True)
    )


def written(folder: Path, scheme: Scheme = SCHEMES[0], **options: Any) -> Path:
    """A quantised small model in folder / "q"; its float original beside it."""
    saved(folder / "m", dtype=torch.bfloat16)
    quantize_folder(folder / "m", folder / "q", scheme, **options)
    return folder / "q"


# The scheme and its layout


@given(config=configs(), bits=st.sampled_from([(8, 8), (4, 4), (4, 8)]), group=st.sampled_from(GROUPS))
def test_the_layout_is_that_of_the_module(config: Gemma2Config, bits: tuple[int, int], group: int) -> None:
    scheme = Scheme(bits[0], group, "rtn", bits[1])
    with torch.device("meta"):
        model = Gemma2(config)
        use_packed_layers(model, scheme)
    dtypes = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
    expected = {name: (tuple(t.shape), t.dtype) for name, t in values(model).items()}
    assert {t.name: (t.shape, dtypes[t.dtype]) for t in layout(config, scheme)} == expected
    assert scheme.nbytes(config) == sum(t.nbytes for t in values(model).values())


@given(config=configs(), scheme=st.sampled_from(SCHEMES))
def test_names_go_there_and_back(config: Gemma2Config, scheme: Scheme) -> None:
    ours = [tensor.name for tensor in layout(config, scheme)]
    theirs = [to_hf(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [from_hf(name) for name in theirs] == ours


def test_names_as_they_are_in_folders() -> None:
    assert to_hf("layers.3.mlp.up.zero") == "model.layers.3.mlp.up_proj.weight_zero_point"
    assert to_hf("embedding.scale") == "model.embed_tokens.weight_scale"
    with pytest.raises(KeyError):
        to_hf("final_norm.scale")


@pytest.mark.parametrize(("preset", "eight", "four"), [("2b", 2.44, 1.33), ("9b", 8.62, 4.71), ("27b", 25.38, 13.87)])
def test_sizes_of_the_published_models(preset: str, eight: float, four: float) -> None:
    config = Gemma2Config.preset(preset)
    assert [round(Scheme(bits).nbytes(config) / 2**30, 2) for bits in (8, 4)] == [eight, four]


IMPOSSIBLE = [(3,), (8, 48), (8.0,), (True,), (4, 64, "awq"), (8, 64, "gptq"), (4, 64, "rtn", 5), (8, 64, "rtn", 4)]


@pytest.mark.parametrize("arguments", IMPOSSIBLE, ids=str)
def test_an_impossible_scheme(arguments: tuple[Any, ...]) -> None:
    if arguments == (8.0,):  # equal to 8, and used as 8
        assert Scheme(*arguments) == Scheme(8)
    else:
        with pytest.raises(UsageError):
            Scheme(*arguments)


# Loading and writing


@by_scheme
@torch.inference_mode()
def test_quantised_on_the_way_and_ahead_of_time_are_the_same(tmp_path: Path, scheme: Scheme) -> None:
    folder = written(tmp_path, scheme)
    ahead = load_model(folder)
    assert scheme_of(ahead) == scheme
    if scheme.embedding_bits == scheme.bits:
        on_the_way = load_model(tmp_path / "m", weights=f"int{scheme.bits}", group=scheme.group)
        assert same(ahead, on_the_way) and scheme_of(on_the_way) == scheme
    original = load_model(tmp_path / "m", dtype=torch.float32)
    for name, module in ahead.named_modules():
        assert not isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        if isinstance(module, QuantLinear | QuantEmbedding):
            weight = original.get_parameter(f"{name}.weight")
            rounded = quantize(weight.detach(), scheme.bits_of(name), scheme.group)
            assert torch.equal(module.quantized().dequantize(), rounded.dequantize()), name
    for name, norm in ahead.named_parameters():
        assert torch.equal(norm, original.get_parameter(name)) and norm.dtype == torch.float32
    ids = random_ids(SMALL, 2, 9)
    assert relative_error(ahead(ids), original(ids)) < (0.1 if scheme.bits == 8 else 1)


def test_pieces_of_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, SCHEMES[1])
    monkeypatch.setattr("cabochon.weights.read.PIECE", 700)  # 16 rows of 40 columns
    assert same(load_model(tmp_path / "m", weights="int4"), load_model(folder))


@by_scheme
def test_saving_a_quantised_model_writes_the_same_folder(tmp_path: Path, scheme: Scheme) -> None:
    folder = written(tmp_path, scheme, tokenizer_files={"tokenizer.json": b"{}"})
    save_model(load_model(folder), tmp_path / "again", tokenizer_files={"tokenizer.json": b"{}"})
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        if name != "model.safetensors":
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert same(load_model(tmp_path / "again"), load_model(folder))


def test_the_method_is_remembered(tmp_path: Path) -> None:
    folder = written(tmp_path, Scheme(4, 64, "gptq", 8))  # only a note here: the values are rounded
    save_model(load_model(folder), tmp_path / "again")
    assert describe(tmp_path / "again").scheme == Scheme(4, 64, "gptq", 8)


def test_a_quantised_model_has_one_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rounded off"):
        save_model(load_model(written(tmp_path)), tmp_path / "x", dtype=torch.bfloat16)
    assert not (tmp_path / "x").exists()


@by_scheme
def test_what_is_in_the_folder(tmp_path: Path, scheme: Scheme) -> None:
    folder = written(tmp_path, scheme)
    tensors = load_file(folder / "model.safetensors")
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
    assert {(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items()} == {
        (to_hf(t.name), t.dtype, t.shape) for t in layout(SMALL, scheme)
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "cabochon", "format": 1, "bits": scheme.bits, "group_size": scheme.group, "method": "rtn",
        "embedding_bits": scheme.embedding_bits,
    }  # fmt: skip
    facts = describe(folder)
    assert (facts.dtype, facts.scheme, facts.nbytes) == (f"int{scheme.bits}", scheme, scheme.nbytes(SMALL))


def test_transformers_refuses_the_folder(tmp_path: Path) -> None:
    """It does not know the format, says so, and fails on the shapes: no silent nonsense."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(written(tmp_path))


@by_scheme
def test_a_prepared_folder_is_used_as_it_is_mapped(tmp_path: Path, scheme: Scheme) -> None:
    folder = written(tmp_path, scheme)
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    pointers = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in values(model).values())
    assert pointers[-1][1] - pointers[0][0] == scheme.nbytes(SMALL)  # one after the other, as in the file
    values(model)["embedding.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("limit", [1, 5000])
def test_shards(tmp_path: Path, limit: int) -> None:
    folder = written(tmp_path, SCHEMES[1], shard_bytes=limit)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert same(load_model(folder), load_model(tmp_path / "m", weights="int4"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_can_be_quantised(tmp_path: Path, stored: torch.dtype) -> None:
    model = saved(tmp_path / "m")
    if stored == torch.float16:
        file = tmp_path / "m" / "model.safetensors"
        change_tensors(file, **{n.replace(".", "__"): t.half() for n, t in load_file(file).items()})
    else:
        save_model(model, tmp_path / "m", dtype=stored, overwrite=True)
    got = load_model(tmp_path / "m", weights="int8").layers[0].mlp.up  # type: ignore[union-attr]
    weight = model.get_parameter("layers.0.mlp.up.weight").detach().to(stored)
    assert torch.equal(got.quantized().q, quantize(weight, 8, 128).q)  # type: ignore[union-attr, operator]


def test_progress_adds_up(tmp_path: Path) -> None:
    done: list[int] = []
    written(tmp_path, SCHEMES[1], report=done.append)
    assert len(done) > 50 and sum(done) == SCHEMES[1].nbytes(SMALL)


# What is asked for and cannot be


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"weights": "int4"}, "8-bit weights: what was rounded off is gone"),
        ({"weights": "bf16"}, "8-bit weights: what was rounded off is gone"),
        ({"dtype": torch.float32}, "float weights"),
        ({"weights": "int8", "dtype": torch.bfloat16}, "float weights"),
        ({"weights": "int7"}, "auto, bf16, lossless, int8, int4"),
    ],
    ids=str,
)
def test_what_a_quantised_folder_cannot_become(tmp_path: Path, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(written(tmp_path), **options)
    assert cause in caught.value.cause


@pytest.mark.parametrize(
    "options", [{"weights": "bf16", "dtype": torch.float32}, {"weights": "int8", "dtype": torch.float32}], ids=str
)
def test_two_forms_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path)
    with pytest.raises(UsageError, match="leave one of the two out"):
        load_model(tmp_path, **options)


def test_bf16_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_model(tmp_path, weights="bf16").embedding.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, weights="bf16", dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_a_quantised_folder_is_not_quantised_again(tmp_path: Path) -> None:
    folder = written(tmp_path)
    with pytest.raises(UsageError, match="quantised already"):
        quantize_folder(folder, tmp_path / "again", SCHEMES[1])
    assert not (tmp_path / "again").exists()


# What is not sound


def on_tensors(**changes: Any) -> Callable[[Path], None]:
    """Replaces tensors by what a function makes of them; None removes them."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = load_file(file)
        new = {n: change and change(held.get(n.replace("__", "."))) for n, change in changes.items()}
        change_tensors(file, **new)

    return apply


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return change


def on_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        change_json(folder / "config.json", quantization_config={**found, **changes})

    return apply


def the_whole(value: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", quantization_config=value)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


UP = "model__layers__0__mlp__up_proj__"
SCALE, ZERO, WEIGHT = UP + "weight_scale", UP + "weight_zero_point", UP + "weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "scale missing": (on_tensors(**{SCALE: None}), "up_proj.weight_scale"),
    "zero point missing": (on_tensors(**{ZERO: None}), "up_proj.weight_zero_point"),
    "weight missing": (on_tensors(**{WEIGHT: None}), "up_proj.weight"),
    "scale of a norm": (on_tensors(model__norm__weight_scale=lambda _: torch.ones(1)), "model.norm.weight_scale"),
    "a head of its own": (on_tensors(lm_head__weight=lambda _: torch.ones(1)), "lm_head.weight"),
    "weights for another group": (on_tensors(**{WEIGHT: lambda t: t[:, :-8].clone()}), "[4, 504] for [4, 512]"),
    "scale too short": (on_tensors(**{SCALE: lambda t: t[:-1].clone()}), "[3, 1, 16] for [4, 1, 16]"),
    "scale as float32": (on_tensors(**{SCALE: lambda t: t.float()}), "weight_scale (F32)"),
    "weight as floats": (on_tensors(**{WEIGHT: lambda t: t.float()}), "up_proj.weight (F32)"),
    "norm as bfloat16": (on_tensors(model__norm__weight=lambda t: t.bfloat16()), "model.norm.weight (BF16)"),
    "scale is not a number": (on_tensors(**{SCALE: with_value(float("nan"))}), "weight_scale has values that are inf"),
    "scale is infinite": (on_tensors(**{SCALE: with_value(float("inf"))}), "weight_scale has values that are inf"),
    "scale below zero": (on_tensors(**{SCALE: with_value(-0.5)}), "weight_scale has values that quantising never"),
    "zero point beyond 15": (on_tensors(**{ZERO: with_value(16)}), "weight_zero_point has values that quantising"),
    "norm is not a number": (on_tensors(model__norm__weight=with_value(float("nan"))), "model.norm.weight has values"),
    "truncated": (cut, "the file has"),
    "another method": (the_whole({"quant_method": "gptq", "bits": 4, "group_size": 64}), "only float weights"),
    "no method": (the_whole({"bits": 4}), "only float weights"),
    "not an object": (the_whole([4]), "not an object"),
    "another format": (on_config(format=2), "format 1 would be"),
    "more than there is": (on_config(sym=True), "format 1 would be"),
    "impossible bits": (on_config(bits=3), "bits 3"),
    "impossible group": (on_config(group_size=48), "group 48"),
    "no group": (on_config(group_size=0), "format 1 would be"),
    "a list of bits": (on_config(bits=[4], group_size=0), "not what `cabochon quantize` writes"),
    "impossible embedding": (on_config(embedding_bits=0), "format 1 would be"),
    "other bits of the embedding": (on_config(embedding_bits=8), "model.embed_tokens.weight_zero_point"),
    "bits as a text": (on_config(bits="4"), "bits '4'"),
    "other bits": (on_config(bits=8, embedding_bits=8), "weight_zero_point"),
    "another group": (on_config(group_size=32), "for ["),
    "not said": (the_whole(None), "weight_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unsound_folder_is_refused(tmp_path: Path, case: str) -> None:
    change, cause = BROKEN[case]
    folder = written(tmp_path, SCHEMES[1])
    load_model(folder)
    change(folder)
    with pytest.raises(BadInput) as caught:
        load_model(folder)
    assert cause in caught.value.cause
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_are_found_while_quantising(tmp_path: Path, value: float) -> None:
    saved(tmp_path / "m")
    on_tensors(**{WEIGHT: with_value(value)})(tmp_path / "m")
    with pytest.raises(BadInput, match=r"up_proj\.weight"):
        load_model(tmp_path / "m", weights="int8")
    with pytest.raises(BadInput, match=r"up_proj\.weight"):
        quantize_folder(tmp_path / "m", tmp_path / "q", Scheme(8))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_head_that_is_not_the_embedding_is_found_before_anything_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    change_tensors(tmp_path / "m" / "model.safetensors", lm_head__weight=torch.zeros(SMALL.vocab_size, 40))
    with pytest.raises(BadInput, match="lm_head"):
        quantize_folder(tmp_path / "m", tmp_path / "q", Scheme(8))


@pytest.mark.parametrize("raw", [{}, {"quantization_config": None}])
def test_float_models_have_no_scheme(raw: dict[str, Any]) -> None:
    assert read_scheme(raw) is None


# Memory


@pytest.mark.parametrize(
    ("free", "weights", "hint"),
    [(1.5, "bf16", "8 bits would fit"), (0.7, "bf16", "4 bits would fit"), (0.7, "int8", "4 bits would fit"),
     (0.2, "bf16", "even 4 bits take"), (0.2, "int4", "even 4 bits take")],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, weights: str, hint: str
) -> None:
    """`free` is in bytes for each parameter."""
    config = Gemma2Config.preset("tiny")
    init_folder(config, tmp_path / "m", tokenizer=False)
    monkeypatch.setattr(fit, "free_memory", lambda _: int(free * config.num_parameters))
    monkeypatch.setattr("cabochon.weights.mapped.MappedFile.__init__", lambda *_: pytest.fail("it was read"))
    with pytest.raises(MissingResource) as caught:
        load_model(tmp_path / "m", weights=weights)
    assert hint in caught.value.hint and "check_memory=False" in caught.value.hint
    assert f"{free * config.num_parameters / 2**20:.1f} MiB are free" in caught.value.cause


def test_the_memory_check_can_be_left_out_and_a_system_can_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    monkeypatch.setattr(fit, "free_memory", lambda _: 1)
    load_model(tmp_path, check_memory=False)
    with pytest.raises(MissingResource):
        load_model(tmp_path)
    monkeypatch.setattr(fit, "free_memory", lambda _: 0)
    load_model(tmp_path)


def test_the_layers_know_their_shapes() -> None:
    model = Gemma2(SMALL)
    use_packed_layers(model, Scheme(4))
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    assert len(packed) == 7 * SMALL.num_layers + 1
    assert (model.embedding.rows, model.embedding.columns) == (SMALL.vocab_size, SMALL.hidden_size)  # type: ignore[union-attr]


anything = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2), st.just("cabochon")
)
keys = st.sampled_from(["quant_method", "bits", "embedding_bits", "group_size", "format", "method"])


@settings(deadline=None)
@given(told=st.dictionaries(keys, anything))
def test_any_configuration_is_read_or_refused(told: dict[str, Any]) -> None:
    try:
        scheme = read_scheme({"quantization_config": told})
    except BadInput:
        return
    assert scheme is not None and scheme.to_hf() == told


# Layers of a model in memory


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("group", [0, 32])
def test_layers_are_quantised_in_place(tmp_path: Path, bits: int, embedding: bool, group: int) -> None:
    model = saved(tmp_path / "m")
    expected = values(load_model(tmp_path / "m", weights=f"int{bits}", group=group))
    before = values(model)
    quantize_layers(model, bits, group, embedding=embedding)
    assert isinstance(model.embedding, QuantEmbedding) is embedding
    for name, tensor in values(model).items():
        floats = "norm" in name or ("embedding" in name and not embedding)
        assert torch.equal(tensor, before[name] if floats else expected[name])
    quantize_layers(model, bits, group)  # what is quantised stays
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    with pytest.raises(UsageError):
        quantize_layers(model, 3)


def test_what_no_folder_can_hold_is_not_written(tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    attach(model, LoraConfig(rank=1))
    with pytest.raises(UsageError, match="it has adapters"):
        save_model(model, tmp_path / "out")
    detach(model)
    quantize_layers(model, 8)
    with pytest.raises(UsageError, match="its embedding is not"):
        save_model(model, tmp_path / "out")
    merge(model)
    save_model(model, tmp_path / "out")
    assert same(load_model(tmp_path / "out"), model)
