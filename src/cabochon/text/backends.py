"""The two libraries that split text into pieces, behind one record of functions.

Each is imported when a tokenizer file of its kind is opened, and not before.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.base.errors import BadInput, MissingResource

_GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Backend:
    """What a tokenizer needs from a library. `encode` adds nothing before or after the text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]  # only to prove that our own way of spelling agrees
    ids: dict[str, int]  # every piece
    special: frozenset[int]  # pieces that the file itself calls control pieces


def open_json(path: Path) -> Backend:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Raises:
        BadInput: the file is damaged or is not a tokenizer.
        MissingResource: the file cannot be read.
    """
    # One text is never shared among threads, and without this the library prints a warning whenever a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    content = _read(path)
    try:
        library = Tokenizer.from_buffer(content)
    except Exception as error:  # the library has no narrower class
        raise _damaged(path, str(error)) from None
    library.encode_special_tokens = True  # control text that a user typed stays text
    library.no_truncation()  # a file may ask for either, and would cut a long prompt without a word
    library.no_padding()
    return Backend(
        # The one call that lets other threads work meanwhile. It is also the fastest: no places in the text are noted.
        encode=lambda text: list(library.encode_batch_fast([text], add_special_tokens=False)[0].ids),
        decode=lambda ids: str(library.decode(ids, skip_special_tokens=False)),
        ids=library.get_vocab(with_added_tokens=True),
        special=frozenset(i for i, added in library.get_added_tokens_decoder().items() if added.special),
    )


def open_sentencepiece(path: Path) -> Backend:
    """A `tokenizer.model`, read by the `sentencepiece` library.

    Raises:
        BadInput: the file is damaged or is not a tokenizer.
        MissingResource: the file cannot be read, or the library is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MissingResource(
            f"{path} cannot be used",
            "it needs the sentencepiece library, which is not installed",
            'run: pip install "cabochon[sentencepiece]"',
        ) from None
    content = _read(path)
    library: Any = SentencePieceProcessor()
    try:
        library.LoadFromSerializedProto(content)
        pieces: list[str] = library.IdToPiece(list(range(library.GetPieceSize())))
    except Exception:  # RuntimeError with a line of C++, or UnicodeError for pieces that are no text
        raise _damaged(path, "it does not hold a whole SentencePiece model") from None
    return Backend(
        encode=library.EncodeAsIds,
        decode=library.DecodeIds,
        ids={piece: i for i, piece in enumerate(pieces)},
        special=frozenset(i for i in range(len(pieces)) if library.IsControl(i) or library.IsUnknown(i)),
    )


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingResource(
            f"{path} cannot be read", error.strerror or str(error), "check the file and its permissions"
        ) from None
    if content.startswith(_GIT_LFS):
        raise BadInput(
            f"{path} is not a tokenizer",
            "it is a Git LFS pointer; the file itself was never fetched",
            "run: git lfs pull",
        )
    return content


def _damaged(path: Path, cause: str) -> BadInput:
    return BadInput(
        f"{path} is damaged or is not a tokenizer",
        cause[:200],
        "fetch the file again from where the model came from",
    )
