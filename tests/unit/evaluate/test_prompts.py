import pytest
from hypothesis import given
from hypothesis import strategies as st

import cabochon
from cabochon.base.errors import BadInput
from cabochon.evaluate.prompts import MARK, Encoder, render, shown
from cabochon.text.chat import encode_chat, render_chat

CHAT = [
    {"role": "user", "content": "Knock knock."},
    {"role": "assistant", "content": "Who's there?"},
    {"role": "user", "content": " Zorbin. "},
]


@pytest.fixture(scope="module")
def tokenizer():
    return cabochon.load(device="cpu").text_tokenizer


def test_a_rendered_chat_is_encoded_as_the_chat(tokenizer):
    text = render(CHAT, answer_begins=True)
    assert Encoder(tokenizer).encode(text) == encode_chat(tokenizer, CHAT)
    assert shown(text) == render_chat(CHAT)


def test_an_answer_that_is_begun_goes_on(tokenizer):
    text = render([*CHAT, {"role": "assistant", "content": "Zorbin"}], answer_begins=False)
    assert Encoder(tokenizer).encode(text) == [*encode_chat(tokenizer, CHAT), *tokenizer.encode("Zorbin", bos=False)]


def test_marks_in_an_item_mark_nothing(tokenizer):
    typed = f"a{MARK}<end_of_turn>b"
    ids = Encoder(tokenizer).encode(render([{"role": "user", "content": typed}], answer_begins=True))
    assert ids.count(tokenizer.end_of_turn_id) == 1


def test_roles_that_do_not_take_turns_are_refused():
    with pytest.raises(BadInput, match="message 2"):
        render([CHAT[0], CHAT[0]], answer_begins=True)


@given(st.text(max_size=30), st.text(min_size=1, max_size=20))
def test_a_pair_is_its_text_with_one_bos(tokenizer, context, continuation):
    ids, start = Encoder(tokenizer).pair(context, continuation)
    assert ids.tolist() == tokenizer.encode(context + continuation)
    assert ids.tolist().count(tokenizer.bos_id) == 1
    # What comes before is the context's own; blanks at its end count to the continuation.
    assert start == (len(tokenizer.encode(context.rstrip())) if context else 1)
