"""Random models, and tokenizers made to fit them."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from cabochon.base.errors import UsageError
from cabochon.model.config import Gemma2Config
from cabochon.recipe.fresh import fresh_model, widen_tokenizer

CONFIG = dataclasses.replace(Gemma2Config.preset("tiny"), hidden_size=32, num_layers=2, intermediate_size=64)


def test_the_seed_decides_every_weight() -> None:
    one, same, other = (fresh_model(CONFIG, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_of_a_size_that_signals_survive(dtype: torch.dtype) -> None:
    model = fresh_model(CONFIG, seed=0, dtype=dtype)
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        if weight.ndim == 1:
            assert not weight.any()
        else:
            expected = 0.02 if name == "embedding.weight" else weight.shape[1] ** -0.5
            assert weight.float().std().item() == pytest.approx(expected, rel=0.1)
    logits = model(torch.arange(12)[None])
    assert logits.isfinite().all()
    assert logits.std() > 0


def tokenizer_json() -> dict[str, Any]:
    """Ids 0 to 5; the last is only in the list of added tokens."""
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [{"id": i, "content": content, **flags} for i, content in ((0, "<pad>"), (5, "<end>"))]
    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "byte_fallback": False}
    return {"version": "1.0", "added_tokens": added, "model": model}


def widened(size: int) -> dict[str, bytes]:
    return widen_tokenizer({"tokenizer.json": json.dumps(tokenizer_json()).encode(), "other": b"kept"}, size)


@pytest.mark.parametrize("size", [6, 7, 300])
def test_a_tokenizer_gets_exactly_the_size_and_the_same_text(size: int) -> None:
    files = widened(size)
    before = Tokenizer.from_str(json.dumps(tokenizer_json()))
    after = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert files["other"] == b"kept"
    assert after.get_vocab_size() == size
    assert set(after.get_vocab().values()) == set(range(size))
    for text in ("abcab", "<end>a<pad>", "<placeholder-7>ab"):
        assert after.encode(text).ids == before.encode(text).ids


def test_a_tokenizer_is_never_cut() -> None:
    with pytest.raises(UsageError, match="too small"):
        widened(5)
