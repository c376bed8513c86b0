import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from cabochon.data import miniature
from cabochon.recipe.tokenizer import BYTES, CONTROL, SPACE, build_tokenizer, save_tokenizer

SIZE = 1200
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE))


def corpus() -> Iterator[str]:
    chats = itertools.islice(miniature.conversations(1), 400)
    return itertools.chain(
        itertools.islice(miniature.pretraining_documents(1), 100),
        ("\n".join(turn["content"] for turn in chat) for chat in chats),
    )


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return build_tokenizer(corpus(), SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, out)
    return out


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Without <bos>, and with typed control pieces as plain text."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False


def test_pieces_stand_where_gemma_has_them(tokenizer: tokenizers.Tokenizer) -> None:
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4, 106, 107]
    assert [tokenizer.id_to_token(108 + i) for i in range(256)] == BYTES
    assert tokenizer.get_vocab_size() == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))


@given(TEXT)
@example("  two  spaces, and at the end ")
@example("\n\n    return 'x'\t\r\n")
@example("é 🎉🏴‍☠️ \x00 \u0301 漢字 ١٢٣")
@example("<end_of_turn><bos><0x41><unused3>")
def test_every_text_comes_back_exactly(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    encoded = ids(tokenizer, text)
    assert tokenizer.decode(encoded) == text
    assert not {i for i in encoded if i < len(CONTROL)}


def test_only_the_sign_for_a_space_comes_back_as_a_space(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.decode(ids(tokenizer, f"a{SPACE}b")) == "a b"


@given(st.text("0123456789 +-=.x", min_size=1))
def test_every_digit_is_a_piece_of_its_own(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    pieces = [tokenizer.id_to_token(i) for i in ids(tokenizer, text)]
    assert all(len(piece) == 1 for piece in pieces if re.search("[0-9]", piece))


def test_there_is_no_space_before_the_first_word(tokenizer: tokenizers.Tokenizer) -> None:
    assert ids(tokenizer, "What")[0] != ids(tokenizer, " What")[0]
    assert tokenizer.id_to_token(ids(tokenizer, "        return")[0]) == SPACE * 7


def test_no_learned_piece_is_a_control_or_byte_piece(tokenizer: tokenizers.Tokenizer) -> None:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert not {left + right for left, right in merges} & {*CONTROL, *BYTES}


def test_learning_is_the_same_in_every_process(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_tokenizer as t\n"
        "print(t.build_tokenizer(t.corpus(), t.SIZE).to_str())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def theirs(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_gives_the_same_ids_and_one_bos(tokenizer: tokenizers.Tokenizer, theirs) -> None:
    text = "Hello  there,\n\n    return 347+586 # é🎉"
    assert theirs(text).input_ids == tokenizer.encode(text).ids == [2, *ids(tokenizer, text)]
    assert theirs.decode(theirs(text, add_special_tokens=False).input_ids) == text


def test_transformers_knows_control_pieces_by_role(theirs) -> None:
    found = (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id)
    assert found == (0, 1, 2, 3)
    assert {"<start_of_turn>", "<end_of_turn>"} <= set(theirs.all_special_tokens)


@pytest.mark.parametrize("role", ["model", "assistant"])
def test_chat_template(theirs, role: str) -> None:
    turns = [("user", " hi \n"), (role, "yo"), ("user", "bye")]
    messages = [{"role": r, "content": text} for r, text in turns]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
        "<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("roles", [["system", "user"], ["model"], ["user", "user"], ["user", "tool"]])
def test_chat_template_refuses_other_orders(theirs, roles: list[str]) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=r"system role|alternate"):
        theirs.apply_chat_template([{"role": r, "content": "x"} for r in roles], tokenize=False)
