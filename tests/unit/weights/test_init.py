"""Models with random weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from cabochon.base.errors import MissingResource, UsageError
from cabochon.base.files import sha256
from cabochon.model.config import Gemma2Config
from cabochon.weights import hub
from cabochon.weights.folder import describe, load_model
from cabochon.weights.init import init_folder, pad_tokenizer
from support import SMALL

WIDE = dataclasses.replace(SMALL, vocab_size=3000)


def tokenizer_json(size: int = 7) -> bytes:
    """Pieces 0 to size-1; the last is in the list of added tokens only."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [{"id": i, "content": content, **flags} for i, content in ((0, "<pad>"), (size - 1, "<end>"))]
    vocabulary = {"<pad>": 0, **{letter: i for i, letter in enumerate("abcde<>unsd_"[: size - 2], 1)}}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model}).encode()


def test_the_seed_decides_every_weight(tmp_path: Path) -> None:
    for name, seed, limit in (("a", 1, 10**9), ("b", 1, 10**9), ("c", 2, 10**9), ("d", 1, 50_000)):
        init_folder(SMALL, tmp_path / name, seed=seed, tokenizer=False, shard_bytes=limit)
    a, b, c = (sha256(tmp_path / name / "model.safetensors") for name in "abc")
    assert a == b != c
    sharded = load_model(tmp_path / "d")
    assert all(
        torch.equal(x, y) for x, y in zip(sharded.parameters(), load_model(tmp_path / "a").parameters(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_distribution(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.weights.init.PIECE", 1000)  # several pieces in each matrix
    init_folder(WIDE, tmp_path / "m", dtype=dtype, tokenizer=False)
    model = load_model(tmp_path / "m")
    firsts = set()
    for weight in model.parameters():
        assert weight.dtype == dtype
        if weight.ndim == 1:
            assert not weight.any()
        else:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(weight.float().mean().item()) < 0.002
            firsts.add(weight[0, 0].item())
    assert len(firsts) > 15  # every matrix has its own values
    flat = model.embedding.weight.flatten()
    assert not torch.equal(flat[:1000], flat[1000:2000])
    assert model(torch.arange(9)[None]).isfinite().all()


def test_a_preset_with_another_vocabulary_and_its_tokenizer(tmp_path: Path) -> None:
    files = {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": b"{}"}
    config = init_folder("tiny", tmp_path / "m", vocab_size=300, tokenizer_files=files)
    assert config == Gemma2Config.preset("tiny").with_vocabulary(300)
    assert describe(tmp_path / "m").tokenizer == "tokenizer.json"
    assert (tmp_path / "m" / "tokenizer_config.json").read_bytes() == b"{}"
    assert Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json")).get_vocab_size() == 300


def test_the_tokenizer_of_the_model_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "files", lambda _: tmp_path)
    with pytest.raises(MissingResource, match="make tiny"):
        init_folder(SMALL, tmp_path / "m")
    init_folder(SMALL, tmp_path / "models" / "tiny", tokenizer_files={"tokenizer.json": tokenizer_json()})
    init_folder(WIDE, tmp_path / "m")
    assert Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json")).get_vocab_size() == 3000


@pytest.mark.parametrize("size", [7, 8, 300])
def test_padding_changes_no_text(size: int) -> None:
    before = Tokenizer.from_str(tokenizer_json().decode())
    files = pad_tokenizer({"tokenizer.json": tokenizer_json(), "other": b"kept"}, size)
    after = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert files["other"] == b"kept"
    assert sorted(after.get_vocab().values()) == list(range(size))
    for text in ("abcde", "<end>a<pad>b", "dead<end>"):
        assert after.encode(text).ids == before.encode(text).ids
        assert after.encode(text).tokens == before.encode(text).tokens


def test_padding_is_never_the_encoding_of_its_own_name() -> None:
    raw: dict[str, Any] = json.loads(tokenizer_json(14))
    files = pad_tokenizer({"tokenizer.json": json.dumps(raw).encode()}, 40)
    assert max(Tokenizer.from_str(files["tokenizer.json"].decode()).encode("<unused_>").ids) < 14


def test_a_vocabulary_that_is_too_small() -> None:
    with pytest.raises(UsageError, match="7 pieces"):
        pad_tokenizer({"tokenizer.json": tokenizer_json()}, 6)
