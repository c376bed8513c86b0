"""What is written: the format as others read it, shards, and what is never replaced."""

import json
from pathlib import Path

import pytest
import torch
from folders import saved
from safetensors import safe_open
from safetensors.torch import load_file

from cabochon.base.errors import UsageError
from cabochon.weights.folder import load_model, save_model
from cabochon.weights.names import shapes, to_hf
from support import SMALL, small_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_library_reads_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path, dtype=dtype)
    theirs = load_file(tmp_path / "model.safetensors")
    assert set(theirs) == {to_hf(name) for name, _ in shapes(SMALL)}
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs[to_hf(name)], parameter.to(dtype))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data_start = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert data_start % 64 == 0


@pytest.mark.parametrize("limit", [1, 20_000, 60_000, 10**9])
def test_shards_hold_everything_once_and_keep_to_the_limit(tmp_path: Path, limit: int) -> None:
    saved(tmp_path, shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    held = {shard.name: load_file(shard) for shard in shards}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    names = [name for tensors in held.values() for name in tensors]
    assert sorted(names) == sorted(to_hf(name) for name, _ in shapes(SMALL))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        document = json.loads(index.read_text())
        assert document["weight_map"] == {n: shard for shard, tensors in held.items() for n in tensors}
        assert document["metadata"]["total_size"] == 4 * SMALL.num_parameters


def test_documents_and_tokenizer_files(tmp_path: Path) -> None:
    saved(tmp_path, dtype=torch.bfloat16, tokenizer_files={"tokenizer.json": b'{"x": 1}\n'})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {key: config[key] for key in SMALL.to_hf()} == json.loads(json.dumps(SMALL.to_hf()))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    assert (tmp_path / "tokenizer.json").read_bytes() == b'{"x": 1}\n'


def test_a_model_with_odd_memory_is_saved_by_value(tmp_path: Path) -> None:
    model = small_model(SMALL)
    up = model.layers[0].mlp.up  # type: ignore[union-attr]
    up.weight = torch.nn.Parameter(torch.randn(40, 56).t())  # type: ignore[union-attr]
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).layers[0].mlp.up.weight, up.weight)  # type: ignore[union-attr]


def test_only_a_model_folder_is_replaced_and_only_on_request(tmp_path: Path) -> None:
    home, target = tmp_path / "home", tmp_path / "m"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            saved(home, overwrite=overwrite)
    assert (home / "thesis.txt").read_text() == "years of work"
    saved(target, shard_bytes=60_000)
    with pytest.raises(UsageError, match="not empty"):
        saved(target)
    saved(target, overwrite=True)
    assert not list(target.glob("*.index.json"))
    assert load_model(target).config == SMALL


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "x.safetensors", "config.json", ""])
def test_a_tokenizer_file_cannot_be_anything_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        saved(tmp_path / "m", tokenizer_files={name: b""})
    assert not (tmp_path / "m").exists()


def test_float16_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float16"):
        saved(tmp_path / "m", dtype=torch.float16)
