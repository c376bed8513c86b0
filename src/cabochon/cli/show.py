"""`cabochon show`: what a model is and what it needs, from its small files alone."""

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.base.errors import MissingResource
from cabochon.cli.options import HubOptions, Json, Model
from cabochon.model.config import Gemma2Config

if TYPE_CHECKING:
    from cabochon.weights.scheme import Scheme

GIB = 2**30


def show(model: Model = None, /, *, json: Json = False, hub: HubOptions = HubOptions()) -> None:
    """Describe a model without loading its weights.

    Example: cabochon show google/gemma-2-9b-it
    """
    from cabochon.weights.folder import load_config
    from cabochon.weights.hub import resolve
    from cabochon.weights.scheme import Scheme
    from cabochon.weights.verify import load_scheme

    folder = resolve(model, weights=False, **asdict(hub))
    config, scheme = load_config(folder), load_scheme(folder)
    facts = {
        "folder": str(folder),
        "parameters": config.num_parameters,
        "quantization": asdict(scheme) if scheme else None,
        "weights_bytes": scheme.nbytes(config) if scheme else None,
        "weights_bytes_bfloat16": 2 * config.num_parameters,
        "weights_bytes_int8": Scheme(8).nbytes(config),
        "weights_bytes_int4": Scheme(4).nbytes(config),
        "cache_bytes_at_full_context": config.cache_bytes(config.max_position),
        "tokenizer_pieces": _pieces(folder),
        "config": asdict(config),
    }
    print(json_format.dumps(facts) if json else _in_words(facts, config, scheme))


def _pieces(folder: Path) -> int | None:
    from cabochon.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder).vocab_size
    except MissingResource:
        return None


def _in_words(facts: dict[str, Any], config: Gemma2Config, scheme: "Scheme | None") -> str:
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
        "weights": _weights(facts, scheme),
        "cache": f"{_size(facts['cache_bytes_at_full_context'])} for one conversation of full length",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _weights(facts: dict[str, Any], scheme: "Scheme | None") -> str:
    """Their size as they are; of float weights in each form that they can be loaded in."""
    if scheme:
        return f"{_size(facts['weights_bytes'])} in {scheme}"
    sizes = (f"{_size(facts[f'weights_bytes_{form}'])} in {form}" for form in ("bfloat16", "int8", "int4"))
    return ", ".join(sizes)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
