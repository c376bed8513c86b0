"""The model that ships inside, in transformers and here: the same folder, the same answers."""

from typing import Any

import pytest
import torch

import cabochon
from cabochon.lm import LM
from cabochon.text.chat import Message, encode_chat
from cabochon.weights.hub import built_in
from support import relative_error

CHATS: list[list[Message]] = [
    [{"role": "user", "content": "What is 347 + 586?"}],
    [{"role": "user", "content": "  Say it like a pirate: Hello, my friend!\n"}],
    [
        {"role": "user", "content": "Knock knock."},
        {"role": "model", "content": "Who's there?"},
        {"role": "user", "content": "Émile 🎉."},
    ],
]


@pytest.fixture(scope="module")
def ours() -> LM:
    return cabochon.load(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(built_in(), dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def test_logits_over_the_whole_context(ours: LM, theirs: Any) -> None:
    """1024 tokens: eight windows."""
    text = " ".join(f"{i} times {i} is {i * i}." for i in range(400))
    ids = torch.tensor([ours.text_tokenizer.encode(text)[: ours.context_length]])
    assert ids.shape[1] == 1024
    assert relative_error(ours.logits(ids), theirs(ids).logits) < 1e-5


def test_256_greedy_tokens(ours: LM, theirs: Any) -> None:
    ids = ours.text_tokenizer.encode("Return a list of the words in the string, using sep as the delimiter.")
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=256, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    ours.model.eval()
    from cabochon.generate.plain import PlainLoop
    from cabochon.generate.sampling import SamplingParams

    loop = PlainLoop(ours.model, [ids], [SamplingParams(max_new_tokens=256)], frozenset())
    assert [loop.step()[0].token for _ in range(256)] == expected
    assert len(set(expected)) > 20


@pytest.mark.parametrize("chat", CHATS, ids=["sum", "pirate", "joke"])
def test_chat_prompts_and_answers(ours: LM, theirs: Any, chat: list[Message]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built_in())
    as_theirs = [{**m, "role": m["role"].replace("model", "assistant")} for m in chat]
    prompt = tokenizer.apply_chat_template(as_theirs, add_generation_prompt=True, return_dict=False)
    assert encode_chat(ours.text_tokenizer, chat) == list(prompt)
    expected = theirs.generate(
        torch.tensor([list(prompt)]), max_new_tokens=120, do_sample=False, eos_token_id=[1, 107], pad_token_id=0
    )[0, len(prompt) :]
    answer = ours.chat(chat, max_new_tokens=120)
    assert answer.token_ids == expected.tolist()
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in built_in().rglob("*")) < 10 * 2**20
