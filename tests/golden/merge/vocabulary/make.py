"""Makes the small tokenizers in this folder and mergekit.safetensors: what mergekit makes of their embeddings.

Run with an environment that has mergekit 0.1.5 and torch 2.13.0:

    OMP_NUM_THREADS=1 python tests/golden/merge/vocabulary/make.py

For every configuration the file holds each model's embedding in the output's vocabulary; the vocabulary and the ids of
a few texts are in its metadata. mergekit walks through tokens in the order of a hash map. Here they come in the order
of ids, and models in that of the list, so that the outcome is always the same.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.build import build_tokenizer
from mergekit.tokenizer.config import TokenizerConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent
COLUMNS, SEED = 6, 2406
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TEXTS = ["a bad cab", "<tool>bed</tool> decade", "abcde [X] fad", "face <image> zz"]


def tokenizer(special, letters, merges, added=()):
    """A tokenizer.json of Gemma's kind. `added`: (text, settings) of tokens that come last or name ordinary ones."""
    pieces = [*special, "\u2581", *letters, *("".join(pair) for pair in merges)]
    pieces += [text for text, _ in added if text not in pieces]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": i, "content": text, **flags} for i, text in enumerate(special)]
    entries += [{"id": pieces.index(text), "content": text, **flags, **own} for text, own in added]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    ordinary = [piece for piece in pieces if piece not in {text for text, _ in added} or piece in letters]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(entries, key=lambda entry: entry["id"]),
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: pieces.index(piece) for piece in ordinary},
            "merges": [list(pair) for pair in merges],
        },
    }


# Rows of the embedding behind the tokenizer. b has two rows more than tokens, d one token more than rows.
MODELS = {
    "a": (tokenizer(SPECIAL, "abcdef", [("a", "b"), ("\u2581", "a"), ("c", "d")]), 16),
    "b": (
        tokenizer(
            SPECIAL,
            "fedcbagz",
            [("a", "d"), ("a", "b"), ("b", "e")],
            [("<tool>", {}), ("</tool>", {}), ("z", {"special": False}), ("[X]", {"special": False, "lstrip": True})],
        ),
        23,
    ),
    "c": (
        tokenizer(
            SPECIAL[:4],
            "abcdgz",
            [("a", "d"), ("\u2581", "c")],
            [("<tool>", {"lstrip": True}), ("<image>", {})],
        ),
        15,
    ),
    "d": (tokenizer(SPECIAL, "abcdef", [("a", "b"), ("c", "d"), ("ab", "e")], [("<late>", {})]), 16),
}
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def source(model, **more):
    return {"source": model, **more}


def token(model, **which):
    return {"source": {"kind": "model_token", "model": model, **which}}


ZERO = {"source": {"kind": "zero"}}
CONFIGS = [
    {"id": "base", "models": "abc", "base": "a", "source": "base"},
    {"id": "base-b", "models": "abc", "base": "b", "source": "base"},
    {"id": "union", "models": "abc", "base": "a", "source": "union"},
    {"id": "union-without-base", "models": "abc", "base": None, "source": "union"},
    {"id": "union-order", "models": "bca", "base": "c", "source": "union"},
    {"id": "model", "models": "abc", "base": "a", "source": "b"},
    {"id": "same", "models": "a", "base": "a", "source": "base"},
    {"id": "stripped", "models": "da", "base": "d", "source": "base"},
    {"id": "stripped-union", "models": "db", "base": "d", "source": "union"},
    {
        "id": "tokens",
        "models": "abc",
        "base": "a",
        "source": "union",
        "tokens": {
            "<tool>": source("c"),
            "<image>": ZERO,
            "<new>": token("b", token="<tool>"),
            "<newer>": token("c", token_id=5),
            "ab": source("b", force=True),
            "<start_of_turn>": {**ZERO, "force": True},
            "cd": source("a"),
        },
        "pad_to_multiple_of": 8,
    },
    {"id": "padded", "models": "abc", "base": None, "source": "union", "pad_to_multiple_of": 32},
    {"id": "exact", "models": "ab", "base": "a", "source": "base", "pad_to_multiple_of": 8},
]


def write_models(folder):
    for name, (document, rows) in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps(document))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
        config = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": rows}
        (folder / name / "config.json").write_text(json.dumps(config))


def in_order_of_ids(get_vocab):
    return lambda self: dict(sorted(get_vocab(self).items(), key=lambda item: item[1]))


def main():
    fast = transformers.PreTrainedTokenizerFast
    fast.get_vocab = in_order_of_ids(fast.get_vocab)
    draw = torch.Generator().manual_seed(SEED)
    inputs = {name: torch.randn(rows, COLUMNS, generator=draw) for name, (_, rows) in MODELS.items()}
    tensors, outcomes = {f"inputs/{name}": tensor for name, tensor in inputs.items()}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        refs = {name: ModelReference.model_validate(str(folder / name)) for name in MODELS}

        def placed(value):
            """A part of a configuration with folders in the place of the models' names."""
            if isinstance(value, dict):
                return {key: placed(inner) for key, inner in value.items()}
            return str(folder / value) if isinstance(value, str) and value in MODELS else value

        for config in CONFIGS:
            given = {k: config[k] for k in ("source", "tokens", "pad_to_multiple_of") if k in config}
            own = TokenizerConfig.model_validate(placed(given))
            models = list(dict.fromkeys(refs[name] for name in config["models"]))
            base = refs[config["base"]] if config["base"] else None
            info = build_tokenizer(base, models, own.source, False, list(own.tokens or {}))
            task = PermutedVocabulary.model_construct(
                tokens=own.tokens, pad_to_multiple_of=own.pad_to_multiple_of, base_model=base, vocabulary_axis=0
            )
            made = task.execute(info, {refs[name]: inputs[name] for name in config["models"]})
            for name in config["models"]:
                tensors[f"{config['id']}/{name}"] = made[refs[name]].clone()
            encode = info.tokenizer.backend_tokenizer.encode
            outcomes[config["id"]] = {
                "tokens": info.tokenizer.get_vocab(),
                "texts": [encode(text, add_special_tokens=False).ids for text in TEXTS],
            }
    versions = {name: version(name) for name in ("mergekit", "torch", "transformers", "tokenizers")}
    documents = {
        "configs": CONFIGS,
        "outcomes": outcomes,
        "texts": TEXTS,
        "rows": {n: r for n, (_, r) in MODELS.items()},
    }
    save_file(tensors, HERE / "mergekit.safetensors", {**versions, **{k: json.dumps(v) for k, v in documents.items()}})
    for name, (document, _) in MODELS.items():
        text = json.dumps({"tokenizer.json": document, "tokenizer_config.json": SETTINGS}, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n")
    print(len(tensors), (HERE / "mergekit.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
