"""Folders are exchanged with transformers in both directions: the same logits in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cabochon.weights.folder import load_model, save_model
from support import SMALL, random_ids, reference_model, relative_error, small_model

LOGITS = 1e-5  # relative, float32


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@torch.no_grad()
def test_transformers_loads_what_we_save(tmp_path: Path, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

    ours = small_model(SMALL)
    save_model(ours, tmp_path, shard_bytes=shard_bytes)
    theirs: Any
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert isinstance(theirs, Gemma2ForCausalLM)
    assert not any(report.values())
    assert theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    ids = random_ids(SMALL, 2, 40)
    assert relative_error(ours(ids), theirs(ids).logits) < LOGITS
    assert theirs.generation_config.eos_token_id == SMALL.eos_ids[0]


@torch.no_grad()
def test_transformers_loads_bfloat16_as_bfloat16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = small_model(SMALL).to(torch.bfloat16)
    save_model(ours, tmp_path)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.embed_tokens.weight, ours.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@torch.no_grad()
def test_we_load_what_transformers_saves(tmp_path: Path, shard_size: str, dtype: torch.dtype) -> None:
    from transformers import Gemma2ForCausalLM

    expected, theirs = reference_model(SMALL, seed=4)
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    ours = load_model(tmp_path)
    assert ours.config == expected.config
    assert ours.embedding.weight.dtype == dtype
    ids = random_ids(SMALL, 2, 40)
    # Loaded anew: `.to(bfloat16).float()` would leave their rotary frequencies rounded.
    again: Any = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    logits = load_model(tmp_path, dtype=torch.float32)(ids)
    assert relative_error(logits, again(ids).logits) < LOGITS


@torch.no_grad()
def test_there_and_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = small_model(SMALL)
    save_model(ours, tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config == ours.config
    for (name, parameter), original in zip(back.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter, original), name
