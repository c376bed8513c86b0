"""Make the files in this folder: `python tests/golden/text/make.py`, which needs sentencepiece and jinja2.

tokenizer.model  a SentencePiece model trained with Gemma's settings on 400 made-up lines
tokenizer.json   the same pieces for the tokenizers library, with the pipeline of Gemma's own tokenizer.json
chat.json        conversations with the text that chat.jinja gives for them, and that text's ids by the tokenizers
                 library, which here is allowed to see control pieces in it

chat.jinja is written by hand after the behavior of the template that is published with google/gemma-2-9b-it.
"""

import io
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEED = 20240627
SPACE = "\u2581"
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
USER_DEFINED = [
    "<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)), "<start_of_turn>", "<end_of_turn>",
    *("\n" * n for n in range(1, 6)), *(SPACE * n for n in range(2, 8)), "<table>", "</table>", "<b>", "</b>",
]  # fmt: skip
SPECIAL = [*CONTROL, "<start_of_turn>", "<end_of_turn>"]
CONVERSATIONS = [
    [("user", "Hello")],
    [("user", " the red house \n"), ("assistant", "\t 12 + 30 = 42\n\n"), ("user", "why?")],
    [("user", "caf\u00e9 \u6f22\u5b57 \U0001f44d\U0001f3fd"), ("assistant", "")],
    [("user", "\u00a0\u2003trimmed\u3000"), ("assistant", "a\n\n  b\n"), ("user", "<b>bold</b>")],
    [("user", ""), ("assistant", "one"), ("user", "two"), ("assistant", "three")],
]


def corpus() -> list[str]:
    """Lines of words, sums and code, the same on every machine."""
    draw = random.Random(SEED)
    words = "the red blue house river bird sings runs over under a small tree and then user model".split()
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(300)]
    lines += [f"{draw.randrange(99)} + {draw.randrange(99)} = ?" for _ in range(50)]
    return lines + [f"def {draw.choice(words)}(x): return x <b>{draw.choice(words)}</b>" for _ in range(50)]


def train() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=520,
        byte_fallback=True, split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity", character_coverage=0.999,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        unk_piece="<unk>", user_defined_symbols=USER_DEFINED, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def convert(model: bytes) -> Any:
    """The SentencePiece model as a `tokenizers.Tokenizer`."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    source: Any = sentencepiece.SentencePieceProcessor()
    source.LoadFromSerializedProto(model)
    ids = {source.IdToPiece(i): i for i in range(source.GetPieceSize())}
    pieces = [piece for piece, i in ids.items() if piece not in CONTROL and not source.IsByte(i)]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces  # user-defined first, then as they were learned: the order is the rank
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # Only these are special in Gemma's file; the other user-defined pieces are found in text like any word.
    added = [AddedToken(piece, normalized=False, special=piece in SPECIAL) for piece in [*CONTROL, *USER_DEFINED]]
    tokenizer.add_tokens(added)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return tokenizer


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """A conversation by chat.jinja, in the environment that transformers renders templates in."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((Path(__file__).parent / "chat.jinja").read_text(encoding="utf-8"))
    return template.render(messages=messages, bos_token="<bos>", add_generation_prompt=add_generation_prompt)


def chats(tokenizer: Any) -> list[dict[str, Any]]:
    rows = []
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = render(messages, add_generation_prompt=turns[-1][0] == "user")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append({"messages": messages, "text": text, "ids": ids})
    return rows


def made_with() -> dict[str, Any]:
    return {"seed": SEED, **{name: version(name) for name in ("sentencepiece", "tokenizers", "jinja2")}}


def make(folder: Path) -> None:
    model = train()
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = convert(model)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    document = {"made_with": made_with(), "chats": chats(tokenizer)}
    (folder / "chat.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
