"""Rows that ask something: what counts as the question, what is left out and said."""

import json
from pathlib import Path
from typing import Any

import pytest

from cabochon.base.errors import BadInput
from cabochon.data.prompts import Prompts, conversation, open_prompts
from cabochon.data.records import BadRow
from cabochon.text.chat import encode_chat
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.weights.hub import built_in


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(built_in())


def opened(folder: Path, tokenizer: Tokenizer, rows: list[Any], **settings: Any) -> Prompts:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_prompts([str(folder / "rows.jsonl")], tokenizer, **{"longest": 64, **settings})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_what_a_row_asks() -> None:
    answered = [user("Hello"), {"role": "assistant", "content": "Hi"}]
    assert conversation({"prompt": "Hello", "answer": "Hi"}) == [user("Hello")]
    assert conversation({"prompt": [user("Hello")], "messages": answered}) == [user("Hello")]
    assert conversation({"messages": answered}) == [user("Hello")]
    assert conversation({"conversations": [{"from": "human", "value": "Hello"}]}) == [user("Hello")]
    system = {"messages": [{"role": "system", "content": "Be brief."}, user("Hello")]}
    assert conversation(system, fold=True) == [user("Be brief.\n\nHello")]
    for row in (system, {"prompt": " "}, {"text": "a"}, {"messages": [answered[1]]}, {"messages": []}):
        with pytest.raises(BadRow):
            conversation(row)
    with pytest.raises(BadRow, match="prompt is empty"):
        conversation({"prompt": ""})
    assert conversation({"prompt": "", "messages": answered}) == [user("Hello")]


def test_ids_and_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "What is 2 + 3?", "answer": 5}, {"text": "?"}, {"prompt": "long " * 80}, {"prompt": "Why?"}]
    found = opened(tmp_path, tokenizer, rows)
    assert [prompt.row for prompt in found] == [rows[0], rows[3]]
    assert found[1].ids == encode_chat(tokenizer, [user("Why?")])
    assert found.longest == len(found[0].ids)
    assert found.remarks() == [
        "1 prompts were too long and left out",
        f"1 rows without a usable prompt left out: {tmp_path}/rows.jsonl:2: it has no 'messages'",
    ]
    assert found.identity() != opened(tmp_path, tokenizer, rows[:1]).identity()
    assert found.identity() == opened(tmp_path, tokenizer, [rows[0], rows[3]]).identity()


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([], {}, "there is no data"),
        ([{"text": "a"}], {}, "have no prompt"),
        ([{"prompt": "long " * 80}], {}, "all 1 have more than 64 tokens"),
        ([{"prompt": "a"}, {"text": "a"}, {"text": "b"}], {"max_bad_rows": 1}, "2 rows have no prompt"),
    ],
)
def test_nothing_to_ask(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as error:
        opened(tmp_path, tokenizer, rows, **settings)
    assert said in f"{error.value.what}, {error.value.cause}"
