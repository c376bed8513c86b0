"""A model to a folder of 8- or 4-bit weights, with the tokens that 4 bits are calibrated on."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cabochon.base.errors import BadInput, MissingResource
from cabochon.data import miniature
from cabochon.data.format import chat_example, text_example
from cabochon.data.pack import Batch, Example, pack
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.weights.calibrate import calibrated
from cabochon.weights.quantize import quantize_folder, rounded
from cabochon.weights.scheme import Scheme
from cabochon.weights.verify import load_config

SEED = 11
ROWS, LENGTH, BATCHES = 4, 512, 8  # 16,384 tokens; four times as many did not make the model inside any better


def quantize(
    source: Path,
    target: Path,
    scheme: Scheme,
    *,
    texts: Sequence[str] = (),
    device: str = "cpu",
    report: Callable[[int], None] = lambda _: None,
    overwrite: bool = False,
) -> None:
    """Write a quantised copy of a model folder, tokenizer and all, whole or not at all.

    Args:
        source: a folder with float weights.
        target: new or empty, unless `overwrite`.
        scheme: bits, group and method; "gptq" calibrates.
        texts: what to calibrate on; none: the conversations and texts of the miniature corpus.
        device: where calibrating computes.
        report: called with the bytes of each tensor that is done; together `scheme.nbytes(config)`.

    Raises:
        MissingResource: no tokenizer to calibrate with, or no space. Nothing is left behind.
        BadInput: the source is not a sound model, or the texts are too short.
        UsageError: the source is quantised already, or the target is in use.
    """
    tokenizer = _tokenizer(source, needed=scheme.method == "gptq")
    tensors = rounded
    if scheme.method == "gptq" and tokenizer:
        length = min(LENGTH, load_config(source).max_position)
        batches = calibration(tokenizer, texts, length) if texts else default_calibration(tokenizer, length)
        tensors = partial(calibrated, batches=batches, device=device)
    quantize_folder(
        source,
        target,
        scheme,
        tensors=tensors,
        tokenizer_files=tokenizer.files() if tokenizer else None,
        report=report,
        overwrite=overwrite,
    )


def calibration(tokenizer: Tokenizer, texts: Iterable[str], length: int = LENGTH) -> list[Batch]:
    """Rows of `length` tokens from texts of one's own. Raises `BadInput` when they do not fill four rows."""
    batches = _batches((text_example(tokenizer, text) for text in texts), BATCHES, length)
    if not batches:
        raise BadInput(
            "the texts are too short to calibrate on",
            f"they do not fill {ROWS} rows of {length} tokens",
            "give more text of the kind that the model will meet",
        )
    return batches


def default_calibration(tokenizer: Tokenizer, length: int = LENGTH) -> list[Batch]:
    """Conversations and running text of the miniature corpus, half and half; text alone without turn tokens."""
    texts = (text_example(tokenizer, text) for text in miniature.pretraining_documents(SEED))
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        return _batches(texts, BATCHES, length)
    chats = (chat_example(tokenizer, chat) for chat in miniature.conversations(SEED))
    return _batches(texts, BATCHES // 2, length) + _batches(chats, BATCHES // 2, length)


def _batches(examples: Iterator[Example], count: int, length: int) -> list[Batch]:
    # Split, so that no row has padding: it would count as input like any other token.
    return list(itertools.islice(pack(examples, ROWS, length, split=True), count))


def _tokenizer(folder: Path, *, needed: bool) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except MissingResource:
        if needed:
            raise
        return None
