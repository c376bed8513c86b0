"""`cabochon show`: what a model is and what it needs, from its small files alone."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cabochon.base.errors import MissingResource
from cabochon.cli.options import HubOptions, Json, Model
from cabochon.model.config import Gemma2Config

GIB = 2**30


def show(model: Model = None, /, *, json: Json = False, hub: HubOptions = HubOptions()) -> None:
    """Describe a model without loading its weights.

    Example: cabochon show google/gemma-2-9b-it
    """
    from cabochon.weights.folder import load_config
    from cabochon.weights.hub import resolve

    folder = resolve(model, weights=False, **asdict(hub))
    config = load_config(folder)
    facts = {
        "folder": str(folder),
        "parameters": config.num_parameters,
        "weights_bytes_bfloat16": 2 * config.num_parameters,
        "cache_bytes_at_full_context": config.cache_bytes(config.max_position),
        "tokenizer_pieces": _pieces(folder),
        "config": asdict(config),
    }
    print(json_format.dumps(facts) if json else _in_words(facts, config))


def _pieces(folder: Path) -> int | None:
    from cabochon.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder).vocab_size
    except MissingResource:
        return None


def _in_words(facts: dict[str, Any], config: Gemma2Config) -> str:
    pieces = facts["tokenizer_pieces"]
    rows = {
        "folder": facts["folder"],
        "architecture": "Gemma 2",
        "parameters": f"{config.num_parameters:,}",
        "layers": f"{config.num_layers}, every other one with a window of {config.sliding_window:,}",
        "hidden size": f"{config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": f"{config.num_heads} of size {config.head_dim}, {config.num_kv_heads} for keys and values",
        "soft caps": f"attention {config.attn_softcap}, logits {config.final_softcap}",
        "vocabulary": f"{config.vocab_size:,}",
        "tokenizer": f"{pieces:,} pieces" if pieces else "none: text commands need one",
        "context": f"{config.max_position:,} tokens",
        "weights": f"{_size(facts['weights_bytes_bfloat16'])} in bfloat16",
        "cache": f"{_size(facts['cache_bytes_at_full_context'])} for one conversation of full length",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
