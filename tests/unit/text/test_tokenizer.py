"""Text to ids and back, alike for both libraries, and what becomes of control text, odd text and odd files."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.text.tokenizer import FILES, Tokenizer, load_tokenizer

CONTROL_TEXT = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused7>",
                "[@BOS@]", "<2mass>"]  # fmt: skip
SPACE = "\u2581"  # stands for a space in pieces, so decoding cannot tell it from one
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=20)
SNIPPETS = [*CONTROL_TEXT, *CONTROL_TEXT, "the ", "red", "house", " ", "\n", "1", "23", "<b>", "</table>", "<0x41>",
            "<", "\u00e9", "\U0001f44d", "x"]  # fmt: skip
TEXTS = st.one_of(UNICODE, st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join))


# Both libraries


def test_ids_come_from_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (106, 107)
    assert tokenizer.stop_ids == {1, 107}
    assert tokenizer.vocab_size == 520
    assert tokenizer.control_ids == set(range(108))


@settings(deadline=None)
@given(text=TEXTS)
def test_both_libraries_agree(from_json: Tokenizer, from_model: Tokenizer, text: str) -> None:
    assume(" " * 8 not in text and "\n" * 6 not in text)  # no piece for these: the libraries cut them differently
    assert from_json.encode(text) == from_model.encode(text)


@settings(deadline=None)
@given(text=TEXTS)
def test_a_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(text=TEXTS)
def test_text_never_becomes_a_control_piece(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode(text, bos=False))


@pytest.mark.parametrize("text", ["", "hello", "<bos>", "<bos>hello", " <bos> <bos>"])
def test_one_bos(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.encode(text, bos=False) == ids[1:]


def test_what_the_library_would_have_done(library: Library, golden: Path) -> None:
    """The same files do turn control text into control pieces, and add a BOS, when nothing prevents it."""
    assert library.encode("<bos><end_of_turn><unused7>").ids == [2, 2, 107, 14]
    sentencepiece: Any = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    sentencepiece.LoadFromSerializedProto((golden / "tokenizer.model").read_bytes())
    assert sentencepiece.EncodeAsIds("<end_of_turn><unused7>") == [107, 14]


def test_digits_runs_of_spaces_and_tags(tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text, bos=False)]

    assert pieces("12 34") == ["1", "2", " ", "3", "4"]
    assert pieces("\n\n\n   <b>") == ["\n\n\n", "   ", "<b>"]


def test_a_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"character 3 is half .*U\+DCE9"):
        tokenizer.encode("ab\udce9")


# Decoding


@settings(deadline=None)
@given(text=TEXTS)
def test_decoding_is_the_librarys(from_json: Tokenizer, library: Library, text: str) -> None:
    ids = from_json.encode(text)
    assert from_json.decode(ids) == library.decode(ids, skip_special_tokens=True)
    assert from_json.decode(ids, skip_control=False) == library.decode(ids, skip_special_tokens=False)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 519)))
def test_decoding_joins_the_bytes(tokenizer: Tokenizer, ids: list[int]) -> None:
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert tokenizer.decode(ids) == joined.decode("utf-8", errors="replace")


def test_bytes_of_pieces(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("\u00e9", bos=False)] == [b"\xc3", b"\xa9"]
    assert tokenizer.token_bytes(107) == b""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_control_pieces_show_only_if_asked_for(tokenizer: Tokenizer) -> None:
    ids = [2, 106, *tokenizer.encode("hi", bos=False), 107]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_control=False) == "<bos><start_of_turn>hi<end_of_turn>"


# Files


def write_json(folder: Path, change: Callable[[Any], None], source: Path) -> Path:
    document = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def three_lines(error: CabochonError) -> bool:
    return [line.split(":")[0].strip() for line in str(error).splitlines()] == ["error", "cause", "hint"]


def test_json_goes_first(tmp_path: Path, golden: Path) -> None:
    shutil.copy(golden / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    assert load_tokenizer(tmp_path).vocab_size == 520


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingResource) as caught:
        load_tokenizer(tmp_path)
    assert three_lines(caught.value)


def test_missing_sentencepiece(tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(golden / "tokenizer.model", tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingResource) as caught:
        load_tokenizer(tmp_path)
    assert 'pip install "cabochon[sentencepiece]"' in caught.value.hint
    assert three_lines(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe\x00", b"<html>Not found</html>", b'{"model": {"type": "BPE"}}'],
)
def test_a_file_of_another_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_tokenizer(tmp_path)
    assert three_lines(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, golden: Path, name: str, share: float) -> None:
    content = (golden / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadInput) as caught:
        load_tokenizer(tmp_path)
    assert three_lines(caught.value)


def test_a_pointer_in_place_of_a_file(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(BadInput, match="git lfs pull"):
        load_tokenizer(tmp_path)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(MissingResource) as caught:
        load_tokenizer(tmp_path)
    assert three_lines(caught.value)


@pytest.mark.parametrize("name", ["<bos>", "<eos>"])
def test_a_vocabulary_without_an_end(tmp_path: Path, golden: Path, name: str) -> None:
    def rename(document: Any) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["<other>"] = vocabulary.pop(name)
        document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != name]
        document["post_processor"] = None

    with pytest.raises(BadInput, match=f"vocabulary has no {name}"):
        load_tokenizer(write_json(tmp_path, rename, golden))


_IN_FRONT = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize("decoder", [None, {"type": "ByteFallback"}, _IN_FRONT], ids=["none", "no spaces", "in front"])
def test_pieces_that_spell_otherwise(tmp_path: Path, golden: Path, decoder: Any) -> None:
    with pytest.raises(BadInput, match="do not spell text as Gemma's do"):
        load_tokenizer(write_json(tmp_path, lambda document: document.update(decoder=decoder), golden))


def test_a_vocabulary_larger_than_the_model(tokenizer: Tokenizer) -> None:
    tokenizer.check_fits(520)
    tokenizer.check_fits(600)
    with pytest.raises(BadInput, match="ids up to 519, the model's vocabulary ends at 518") as caught:
        tokenizer.check_fits(519)
    assert three_lines(caught.value)


def test_holes_count_as_ids(tmp_path: Path, golden: Path) -> None:
    folder = write_json(tmp_path, lambda d: d["model"]["vocab"].update(far=999), golden)
    assert load_tokenizer(folder).vocab_size == 1000


def test_no_turn_pieces_and_no_pad(tmp_path: Path, golden: Path) -> None:
    gone = ["<start_of_turn>", "<end_of_turn>", "<pad>"]

    def remove(document: Any) -> None:
        for name in gone:
            del document["model"]["vocab"][name]
        document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in gone]

    found = load_tokenizer(write_json(tmp_path, remove, golden))
    assert found.start_of_turn_id is found.end_of_turn_id is None
    assert found.stop_ids == {1}
    assert found.pad_id == 1


def test_truncation_and_padding_in_a_file_are_ignored(tmp_path: Path, golden: Path) -> None:
    def cut(document: Any) -> None:
        document["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        document["padding"] = {"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None,
                               "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip

    found = load_tokenizer(write_json(tmp_path, cut, golden))
    text = "the red house " * 9
    assert found.decode(found.encode(text), skip_control=False) == "<bos>" + text


def test_line_ends_called_special_stay_text(tmp_path: Path, golden: Path) -> None:
    def mark(document: Any) -> None:
        for token in document["added_tokens"]:
            token["special"] |= not token["content"].strip("\n")

    found = load_tokenizer(write_json(tmp_path, mark, golden))
    assert found.decode(found.encode("a\n\nb")) == "a\n\nb"


def test_an_unknown_character_keeps_its_place(tmp_path: Path, golden: Path) -> None:
    folder = write_json(tmp_path, lambda document: document["model"].update(byte_fallback=False), golden)
    assert load_tokenizer(folder).encode("1\u6f222", bos=False)[1:2] == [3]


def test_a_merge_that_leads_to_a_control_piece(tmp_path: Path, golden: Path) -> None:
    def merge(document: Any) -> None:
        document["model"]["vocab"].update({"<": 520, "eos>": 521, "eo": 522, "s>": 523, ">": 524})
        document["model"]["merges"][:0] = [["e", "o"], ["s", ">"], ["eo", "s>"], ["<", "eos>"]]

    found = load_tokenizer(write_json(tmp_path, merge, golden))
    assert found.encode("a<eos>b", bos=False) == [
        *found.encode("a<", bos=False),
        521,
        *found.encode("b", bos=False),
    ]


def test_a_normalizer_that_makes_control_text(tmp_path: Path, golden: Path) -> None:
    def fold(document: Any) -> None:
        for token in document["added_tokens"]:
            token["special"], token["normalized"] = False, True
        document["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "NFKC"}, document["normalizer"]],
        }

    found = load_tokenizer(write_json(tmp_path, fold, golden))
    assert found.encode("a\uff1cbos\uff1eb", bos=False) == found.encode("ab", bos=False)


def test_saving_writes_the_files_unchanged(tmp_path: Path, golden: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    shutil.copy(golden / "tokenizer.json", source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"not a tokenizer file")
    loaded = load_tokenizer(source)
    loaded.save(target)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == loaded.files()
    assert set(loaded.files()) == {"tokenizer.json", "tokenizer_config.json"} < set(FILES)
    assert load_tokenizer(target).encode("the red house") == loaded.encode("the red house")


def test_the_golden_files_are_what_their_script_makes(tmp_path: Path, golden: Path, maker: ModuleType) -> None:
    recorded = json.loads((golden / "chat.json").read_text(encoding="utf-8"))["made_with"]
    if recorded != maker.made_with():
        pytest.skip("made with other versions of the libraries")
    shutil.copy(golden / "chat.jinja", tmp_path)
    maker.make(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "chat.json"):
        assert (tmp_path / name).read_bytes() == (golden / name).read_bytes(), name
