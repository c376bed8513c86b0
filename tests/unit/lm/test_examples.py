"""What files of texts and answers become, and what is said about those that cannot be used."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cabochon
from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.lm.examples import read_examples

TOKENIZER = cabochon.load().text_tokenizer


def read(path: Path, content: str | bytes, context: int = 512):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(path, TOKENIZER, context)


def rows(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    text = "A caf\u00e9 in words. " * 60
    found = read(tmp_path / "a.txt", "\ufeff" + text, context=50)
    assert found.nbytes == len(text.encode()) and not found.answers
    assert [i for e in found.examples for i in e.ids[1:]] == TOKENIZER.encode(text, bos=False)
    assert max(len(e.ids) for e in found.examples) == 50


def test_rows_are_texts_of_their_own(tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", rows({"text": "One.", "more": 1}, {"text": "Two."}) + "\n")
    assert [e.ids for e in found.examples] == [TOKENIZER.encode(text) for text in ("One.", "Two.")]
    assert found.nbytes == 8 and not found.answers


def test_answers_are_what_is_learned(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Ho "}]
    found = read(tmp_path / "a.jsonl", rows({"prompt": "2 + 2 =", "completion": " 4"}, {"messages": chat}))
    learned = [[i for i, kept in zip(e.ids, e.learned, strict=True) if kept] for e in found.examples]
    assert found.answers and found.nbytes == 4
    assert TOKENIZER.decode(learned[0]) == " 4"
    assert TOKENIZER.decode(learned[1], skip_control=False) == "Ho<end_of_turn>"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "no text in it"),
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
        ("a.jsonl", "\n\n", "no text in it"),
        ("a.jsonl", rows({"text": "a"}) + "{", "a.jsonl:2 cannot be used\n  cause: it is not a line of JSON"),
        ("a.jsonl", rows([1]), "it has no text"),
        ("a.jsonl", rows({"prompt": "a"}), "no prompt with a completion"),
        ("a.jsonl", rows({"prompt": "a", "completion": ""}), "there is no answer"),
        ("a.jsonl", rows({"messages": [{"role": "user", "content": "Hi"}]}), "no messages with an answer"),
        ("a.jsonl", rows({"messages": [{"role": "cook", "content": "Hi"}]}), "a.jsonl:1"),
        ("a.jsonl", rows({"text": "a"}, {"prompt": "a", "completion": "b"}), "some rows have answers"),
        ("a.jsonl", '{"text": "\\ud800"}', "surrogate"),
        ("a.jsonl", "[" * 100_000, "not a line of JSON"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path / name, content)
    assert said in str(caught.value) and name in caught.value.what


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingResource):
        read_examples(tmp_path / "no.txt", TOKENIZER, 512)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["text", "prompt", "completion", "messages"]),
            st.text(max_size=9)
            | st.integers()
            | st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()})),
        ),
        max_size=3,
    )
)
def test_any_rows_are_read_or_refused(tmp_path: Path, objects: list[object]) -> None:
    with contextlib.suppress(CabochonError):
        assert read(tmp_path / "any.jsonl", rows(*objects)).examples
