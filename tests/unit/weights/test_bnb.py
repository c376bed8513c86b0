"""Folders that transformers saved with bitsandbytes settings: every value as bitsandbytes itself gives it back.

The folders in tests/golden/bitsandbytes were written by the two libraries (make.py beside them).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import change_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cabochon.base.errors import BadInput
from cabochon.model.linear import quantize
from cabochon.weights import bnb
from cabochon.weights.folder import describe, load_model
from cabochon.weights.header import read_header
from cabochon.weights.names import from_hf
from cabochon.weights.quantize import quantize_folder
from cabochon.weights.scheme import Scheme

GOLDEN = Path(__file__).parents[2] / "golden" / "bitsandbytes"
KINDS = ["int8", "nf4", "nf4-double", "fp4"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_every_value_is_that_of_bitsandbytes(kind: str, dtype: torch.dtype | None) -> None:
    expected, stored = load_file(GOLDEN / kind / "expected.safetensors"), load_file(GOLDEN / kind / "model.safetensors")
    model = load_model(GOLDEN / kind, dtype=dtype)
    wanted = dtype or torch.bfloat16
    assert len(expected) == 7
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(from_hf(name)), value.to(wanted)), name
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(from_hf(name)), stored[name].to(wanted))
    assert {p.dtype for p in model.parameters()} == {wanted}


@pytest.mark.parametrize("kind", KINDS)
def test_onward_into_our_own_formats(kind: str, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / kind / "expected.safetensors")
    quantize_folder(GOLDEN / kind, tmp_path / "q", Scheme(4))
    for model in (load_model(GOLDEN / kind, weights="int4"), load_model(tmp_path / "q")):
        for name, value in expected.items():
            layer: Any = model.get_submodule(from_hf(name).removesuffix(".weight"))
            assert torch.equal(layer.quantized().q, quantize(value, 4).q)
    assert describe(tmp_path / "q").scheme == Scheme(4)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_rows_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(GOLDEN / kind)
    monkeypatch.setattr("cabochon.weights.read.PIECE", 1)  # 16 rows: blocks of 64 values go on from piece to piece
    pieces = load_model(GOLDEN / kind)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters(), strict=True))


def slowly(codes: list[int], table: list[float], scales: list[float], block: int) -> list[float]:
    return [table[code] * scales[i // block] for i, code in enumerate(codes)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 50),
    block=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    count=st.sampled_from([2, 16]),
    seed=st.integers(0, 999),
)
def test_any_matrix_of_4_bits_against_a_slow_decoder(
    tmp_path: Path, rows: int, columns: int, block: int, nested: bool, count: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    total = rows * columns
    codes = torch.randint(0, 16, (total + total % 2,), generator=draw, dtype=torch.uint8)
    table, blocks = torch.randn(16, generator=draw), -(-total // block)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    tensors = {"x.weight": (codes[::2] << 4 | codes[1::2])[:, None], "x.weight.quant_map": table}
    if nested:
        numbers, outer = torch.randint(0, 256, (blocks,), generator=draw), torch.rand(-(-blocks // 32), generator=draw)
        second = torch.randn(256, generator=draw)
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors |= {
            "x.weight.absmax": numbers.byte(),
            "x.weight.nested_absmax": outer,
            "x.weight.nested_quant_map": second,
        }
        scales = [s + 0.25 for s in slowly(numbers.tolist(), second.tolist(), outer.tolist(), 32)]
    else:
        tensors["x.weight.absmax"] = torch.rand(blocks, generator=draw)
        scales = tensors["x.weight.absmax"].tolist()
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode())).byte()
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    matrix = bnb.claim(stored, {"x.weight": (rows, columns)})["x.weight"]
    got = torch.cat(list(matrix.rows(count)))
    expected = torch.tensor(slowly(codes[:total].tolist(), table.tolist(), scales, block)).view(rows, columns)
    assert stored == {}
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_layers_that_were_left_out_are_floats(copy: Callable[[str], Path]) -> None:
    folder, name = copy("nf4"), "model.layers.0.mlp.up_proj.weight"
    held = load_file(folder / "model.safetensors")
    value = torch.randn(52, 40).bfloat16()
    kept = {n: t for n, t in held.items() if not n.startswith(name)}
    save_file({**kept, name: value}, folder / "model.safetensors")
    assert torch.equal(load_model(folder).get_parameter(from_hf(name)), value)


Q = "model.layers.0.self_attn.q_proj."
STATE = Q + "weight.quant_state.bitsandbytes__nf4"


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(Q + name)


def put(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda t: t.update({Q + name: make(t)})


def say(**changes: Any) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def raw(text: bytes) -> Callable[[Tensors], object]:
    return put("weight.quant_state.bitsandbytes__nf4", lambda _: torch.tensor(list(text), dtype=torch.uint8))


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1] = value
    return tensor


BROKEN: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scales": ("int8", drop("SCB"), "quant_state"),
    "too few scales": ("int8", put("SCB", lambda t: t[Q + "SCB"][1:].clone()), "SCB"),
    "scales of another dtype": ("int8", put("SCB", lambda t: t[Q + "SCB"].half()), "SCB"),
    "a scale is NaN": ("int8", put("SCB", lambda t: spoiled(t[Q + "SCB"], float("nan"))), "SCB has values"),
    "order of a GPU": ("int8", put("weight_format", lambda _: torch.tensor(2).byte()), "order of some GPU"),
    "order of a strange kind": ("int8", put("weight_format", lambda _: torch.tensor([0, 0])), "order of some GPU"),
    "8 bits of another shape": ("int8", put("weight", lambda t: t[Q + "weight"].t().contiguous()), "weight"),
    "no matrix": ("int8", drop("weight"), "q_proj.weight"),
    "4 bits, no absmax": ("nf4", drop("weight.absmax"), "absmax"),
    "absmax too short": ("nf4", put("weight.absmax", lambda t: t[Q + "weight.absmax"][1:].clone()), "absmax"),
    "absmax is infinite": (
        "nf4", put("weight.absmax", lambda t: spoiled(t[Q + "weight.absmax"], float("inf"))), "absmax has values"
    ),
    "no table": ("nf4", drop("weight.quant_map"), "quant_map"),
    "table is NaN": (
        "nf4", put("weight.quant_map", lambda t: spoiled(t[Q + "weight.quant_map"], float("nan"))), "quant_map has"
    ),
    "a part that does not belong": ("nf4", put("weight.nested_absmax", lambda _: torch.ones(1)), "nested_absmax"),
    "8-bit scales at 4 bits": ("nf4", put("SCB", lambda _: torch.ones(24)), "absmax"),
    "too few numbers": ("nf4", put("weight", lambda t: t[Q + "weight"][1:].clone()), "weight"),
    "no state": ("nf4", drop("weight.quant_state.bitsandbytes__nf4"), "no single, short quant_state"),
    "two states": (
        "nf4", put("weight.quant_state.bitsandbytes__fp4", lambda t: t[STATE].clone()), "no single, short quant_state"
    ),
    "a long state": ("nf4", raw(b" " * 5000), "no single, short quant_state"),
    "state is no JSON": ("nf4", raw(b"{"), "sound JSON"),
    "state twice": ("nf4", raw(b'{"blocksize": 64, "blocksize": 32}'), "twice"),
    "state is a list": ("nf4", raw(b"[]"), "not a JSON object"),
    "another shape": ("nf4", say(shape=[40, 24]), "does not describe a matrix of 24 x 40"),
    "another type": ("nf4", say(quant_type="fp4"), "does not describe"),
    "strange blocks": ("nf4", say(blocksize=63), "does not describe"),
    "no blocks": ("nf4", say(blocksize=0), "does not describe"),
    "blocks as a text": ("nf4", say(blocksize="64"), "does not describe"),
    "other blocks": ("nf4", say(blocksize=128), "absmax"),
    "more than is known": ("nf4", say(zero_point=1), "does not describe"),
    "less than is needed": ("nf4", say(shape=None), "does not describe"),
    "nested, no table": ("nf4-double", drop("weight.nested_quant_map"), "nested_quant_map"),
    "nested, no offset": ("nf4-double", say(nested_offset=None), "does not describe"),
    "nested, huge offset": ("nf4-double", raw(b'{"nested_offset": 1e999, "nested_blocksize": 256}'), "does not"),
    "nested is not said": (
        "nf4-double", say(nested_blocksize=None, nested_offset=None, nested_dtype=None), "nested_absmax"
    ),
    "the matrix of others": ("nf4", lambda t: t.update({"model.layers.1.mlp.up_proj.SCB": torch.ones(1)}), "layers.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_an_unsound_folder_is_refused(copy: Callable[[str], Path], case: str) -> None:
    kind, change, cause = BROKEN[case]
    folder = copy(kind)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput) as caught:
        load_model(folder)
    assert cause in caught.value.cause
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_has_to_say_so(copy: Callable[[str], Path], kind: str) -> None:
    folder = copy(kind)
    change_json(folder / "config.json", quantization_config=None)
    with pytest.raises(BadInput, match="Gemma 2 does not have"):
        load_model(folder)
