"""A model folder with random weights, of any size, written piece by piece: memory stays small even for 27b."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cabochon.base.errors import UsageError
from cabochon.model.config import Gemma2Config
from cabochon.weights.hub import built_in
from cabochon.weights.names import shapes, to_hf
from cabochon.weights.save import PIECE, SHARD_BYTES, Entry, write_folder

DEVIATION = 0.02  # of the normal distribution that matrices are drawn from
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def init_folder(
    preset_or_config: str | Gemma2Config,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: bool = True,
    tokenizer_files: Mapping[str, bytes] | None = None,
    vocab_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Gemma2Config:
    """Write a model whose matrices are normal with deviation 0.02 and whose norms are the identity.

    Args:
        preset_or_config: "2b", "9b", "27b", "tiny", or any configuration.
        out: new or empty, unless `overwrite`.
        dtype: bfloat16 or float32.
        seed: the same seed gives the same weights.
        tokenizer: whether to add one, padded with unused pieces to the size of the vocabulary.
        tokenizer_files: what it starts from; None takes the tokenizer of the model that ships inside.
        vocab_size: replaces the configuration's.

    Raises:
        UsageError: an unknown preset, a folder in use, or a vocabulary smaller than the tokenizer.
        MissingResource: no space, or no tokenizer to start from.
    """
    config = Gemma2Config.preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    if vocab_size is not None:
        config = config.with_vocabulary(vocab_size)
    files: Mapping[str, bytes] = {}
    if tokenizer:
        files = pad_tokenizer(tokenizer_files or _built_in_tokenizer(), config.vocab_size)
    entries = [Entry(to_hf(name), shape, partial(_draw, name, shape, seed)) for name, shape in shapes(config)]
    write_folder(
        out,
        config,
        entries,
        dtype=dtype,
        tokenizer_files=files,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    return config


def pad_tokenizer(files: Mapping[str, bytes], size: int) -> dict[str, bytes]:
    """Tokenizer files whose tokenizer.json has exactly `size` pieces; the added ones never come out of text.

    Raises `UsageError` when there are more pieces than `size` already.
    """
    document = json.loads(files["tokenizer.json"])
    pieces: dict[str, int] = document["model"]["vocab"]
    for token in document["added_tokens"]:  # those outside the vocabulary would move behind the padding
        pieces.setdefault(token["content"], token["id"])
    used = set(pieces.values())
    if max(used) >= size:
        raise UsageError(
            f"a vocabulary of {size} is too small",
            f"the tokenizer that it starts from has {max(used) + 1} pieces",
            f"use at least {max(used) + 1}, or leave the tokenizer out",
        )
    # No merge leads to these, so no text is ever encoded to them.
    pieces.update((f"<unused_{i}>", i) for i in range(size) if i not in used)
    return {**files, "tokenizer.json": json.dumps(document, ensure_ascii=False).encode()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """The values of one parameter, float32, piece by piece. Each has its own stream, so order does not matter."""
    count = torch.Size(shape).numel()
    if len(shape) == 1:  # a norm multiplies by 1 + weight
        yield torch.zeros(count)
        return
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    for start in range(0, count, PIECE):
        yield torch.empty(min(PIECE, count - start)).normal_(std=DEVIATION, generator=stream)


def _built_in_tokenizer() -> dict[str, bytes]:
    folder = built_in()
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
