"""A tokenizer in Gemma's manner, trained from text: BPE, spaces as U+2581, single digits, byte fallback.

Control pieces have Gemma's own ids, so that 106 and 107 start and end a turn in a vocabulary of any size.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from cabochon.text.chat import CHAT_TEMPLATE

SPACE = "\u2581"
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{i}>" for i in range(101)),
           "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
BYTES = [f"<0x{i:02X}>" for i in range(256)]

# A piece never crosses these borders: a word with the space before it, one digit, a run of spaces or of line
# ends (indentation is a piece), a run of marks.
_BORDERS = rf"[0-9]|{SPACE}?[A-Za-z_]+|{SPACE}+(?![A-Za-z_])|{SPACE}+|\n+|[^0-9A-Za-z_{SPACE}\n]+"


def build_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from the documents until there are `vocab_size` pieces, control and byte pieces included.

    Decoding gives every text back exactly, except that U+2581 comes back as the space it stands for, as in
    Gemma's own tokenizer.
    """
    learner = Tokenizer(BPE(unk_token="<unk>"))
    learner.normalizer, learner.pre_tokenizer = _normalizer(), _splitter()
    ready = CONTROL + BYTES
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=ready,
        limit_alphabet=160,  # what is rarer is spelled in bytes
        initial_alphabet=[*map(chr, range(33, 127)), SPACE, "\n"],
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    return _assemble(json.loads(learner.to_str())["model"])


def _assemble(learned: dict[str, Any]) -> Tokenizer:
    """The learned vocabulary and merges with byte fallback, where byte pieces are no longer control pieces."""
    merges = [(left, right) for left, right in learned["merges"]]
    model = BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _splitter()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", CONTROL.index("<bos>"))]
    )
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Replace(" ", SPACE)


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(_BORDERS), behavior="isolated")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and what transformers reads beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
