"""Rows of every shape to ids and a mask, and why the others are refused."""

from typing import Any

import pytest

from cabochon.base.errors import BadInput
from cabochon.data.format import Pair, detect_shape, record_examples
from cabochon.data.pack import Example
from cabochon.data.records import BadRow, Record
from cabochon.text.chat import encode_chat, encode_chat_with_mask
from cabochon.text.tokenizer import Tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = [user("the tree"), model("sings"), user("why?"), model("12 + 30")]


def examples(tokenizer: Tokenizer, row: dict[str, Any], *, fold: bool = False, **fields: Any) -> tuple[Example, ...]:
    record = Record("f:1", 0, row, "row", **fields)
    return record_examples(tokenizer, record, detect_shape(row, "f:1"), fold=fold)


def learned(tokenizer: Tokenizer, example: Example) -> str:
    """The text that is learned, stretch by stretch."""
    stretches, before = [], False
    for token, mine in zip(example.ids, example.learned, strict=True):
        if mine and not before:
            stretches.append([])
        if mine:
            stretches[-1].append(token)
        before = mine
    return "|".join(tokenizer.decode(stretch, skip_control=False) for stretch in stretches)


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ("text", "text"),
        ("text meta id", "text"),
        ("prompt completion", "completion"),
        ("messages prompt prompt_id", "messages"),
        ("conversations id", "messages"),
        ("prompt chosen rejected", "preference"),
        ("chosen rejected", "preference"),
        ("prompt chosen rejected messages score", "messages"),
    ],
)
def test_the_shape_follows_from_the_keys(keys: str, shape: str) -> None:
    assert detect_shape(keys.split(), "f:1") == shape


def test_other_keys_are_named() -> None:
    with pytest.raises(BadInput, match=r"f:1 is not of a known shape\n  cause: its keys are 'answer', 'question'\n"):
        detect_shape(["question", "answer"], "f:1")


def test_text_is_learned_from_the_first_word_to_the_end(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenizer, {"text": "the <bos> tree"})
    assert example.ids == [*tokenizer.encode("the <bos> tree"), tokenizer.eos_id] and all(example.learned)
    assert example.ids.count(tokenizer.bos_id) == 1
    (middle,) = examples(tokenizer, {"text": "the tree"}, begins=False, ends=False)
    assert middle.ids == tokenizer.encode("the tree", bos=False)


def test_only_the_completion_is_learned(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenizer, {"prompt": "the tree", "completion": " sings"})
    assert example.ids == [*tokenizer.encode("the tree"), *tokenizer.encode(" sings", bos=False), tokenizer.eos_id]
    assert learned(tokenizer, example) == " sings<eos>"
    (alone,) = examples(tokenizer, {"prompt": "", "completion": "sings"})
    assert alone.ids[0] == tokenizer.bos_id and learned(tokenizer, alone) == "sings<eos>"


def test_every_turn_of_the_model_is_learned(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenizer, {"messages": CHAT})
    assert learned(tokenizer, example) == "sings<end_of_turn>|12 + 30<end_of_turn>"
    assert example.ids == encode_chat(tokenizer, CHAT, add_generation_prompt=False)


def test_the_roles_of_sharegpt(tokenizer: Tokenizer) -> None:
    row = {"conversations": [{"from": "human", "value": "the tree"}, {"from": "gpt", "value": "sings"}]}
    assert examples(tokenizer, row) == examples(tokenizer, {"messages": CHAT[:2]})


def test_of_a_prompt_with_messages_the_completion_alone_is_learned(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenizer, {"prompt": CHAT[:3], "completion": CHAT[3:]})
    assert learned(tokenizer, example) == "12 + 30<end_of_turn>"
    assert example.ids == encode_chat(tokenizer, CHAT, add_generation_prompt=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT[:3], "chosen": [model("yes")], "rejected": [model("no")]},
        {"chosen": [*CHAT[:3], model("yes")], "rejected": [*CHAT[:3], model("no")]},
        # as ultrafeedback_binarized has it: the prompt as a text, and whole conversations
        {"prompt": "why?", "chosen": [*CHAT[:3], model("yes")], "rejected": [*CHAT[:3], model("no")]},
    ],
)
def test_two_answers_share_their_prompt(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    pair = examples(tokenizer, row)
    assert isinstance(pair, Pair)
    assert [learned(tokenizer, example) for example in pair] == ["yes<end_of_turn>", "no<end_of_turn>"]
    assert pair.chosen.ids == encode_chat_with_mask(tokenizer, [*CHAT[:3], model("yes")])[0]


def test_two_answers_as_texts(tokenizer: Tokenizer) -> None:
    pair = examples(tokenizer, {"prompt": "the tree", "chosen": " sings", "rejected": " runs"})
    assert [learned(tokenizer, example) for example in pair] == [" sings<eos>", " runs<eos>"]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "folded"),
    [
        ({"messages": [SYSTEM, *CHAT]}, {"messages": [user("Be brief.\n\nthe tree"), *CHAT[1:]]}),
        (
            {"prompt": [SYSTEM, CHAT[0]], "completion": [CHAT[1]]},
            {"prompt": [user("Be brief.\n\nthe tree")], "completion": [CHAT[1]]},
        ),
        (
            {"chosen": [SYSTEM, CHAT[0], model("a")], "rejected": [SYSTEM, CHAT[0], model("b")]},
            {"prompt": [user("Be brief.\n\nthe tree")], "chosen": [model("a")], "rejected": [model("b")]},
        ),
    ],
)
def test_a_system_message_is_refused_or_folded(
    tokenizer: Tokenizer, row: dict[str, Any], folded: dict[str, Any]
) -> None:
    with pytest.raises(BadRow, match="system message") as error:
        examples(tokenizer, row)
    assert "--fold-system" in error.value.hint
    assert examples(tokenizer, row, fold=True) == examples(tokenizer, folded)


def test_an_empty_system_message_says_nothing(tokenizer: Tokenizer) -> None:
    row = {"messages": [{"role": "system", "content": " "}, *CHAT]}
    assert examples(tokenizer, row) == examples(tokenizer, {"messages": CHAT})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "it has no 'text'"),
        ({"text": 12}, "'text' is not a text"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "completion": None}, "it has no 'completion'"),
        ({"prompt": None, "completion": "a"}, "it has no 'prompt'"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": [model("b")]}, "both texts or both lists of messages"),
        ({"prompt": {"a": 1}, "completion": "b"}, "both texts or both lists of messages"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "the roles user and model take turns"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "message 1 of messages is not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 of messages needs a role and a content"),
        ({"messages": [user("a"), {"role": "assistant", "content": ["b"]}]}, "message 2 of messages needs a role"),
        ({"messages": [user("a"), model(" ")]}, "message 2 of messages is empty"),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "the role 'tool'"),
        ({"messages": [model("a"), user("b")]}, "the user begins"),
        ({"messages": [user("a"), SYSTEM]}, "Gemma 2 was trained without a system role"),
        ({"messages": [SYSTEM]}, "system message"),
        ({"messages": [user("a")]}, "nothing in it that could be learned|says nothing"),
        ({"conversations": [{"from": "human", "value": None}]}, "message 1 of conversations needs a role"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "it has no 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "it has no 'prompt'"),
        ({"chosen": CHAT, "rejected": CHAT}, "says nothing"),
    ],
)
def test_a_row_that_teaches_nothing_says_why(tokenizer: Tokenizer, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        examples(tokenizer, row)


def test_a_row_without_its_conversation_is_told_what_is_missing(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRow, match="it has no 'messages'"):
        record_examples(tokenizer, Record("rows.jsonl:2", 1, {"text": "a"}, "row"), "messages", fold=False)
