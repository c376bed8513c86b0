"""What the model inside can do, measured on what its training never saw."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from cabochon.data import miniature
from cabochon.data.miniature import arithmetic, facts, jokes
from cabochon.lm import LM
from cabochon.model.head import token_losses
from cabochon.text.chat import Message, encode_chat

T = TypeVar("T")

NAMES = {"add": "addition up to 999", "sub": "subtraction up to 999", "mul": "times tables up to 12"}


def score(lm: LM, sums: int = 600, knocks: int = 50) -> dict[str, float]:
    """Shares of right answers (greedy), and bits per byte of held-out code and prose."""
    found: dict[str, float] = {}
    problems = miniature.held_out_arithmetic(sums)
    asked = [_ask(problem.question(way)) for problem, way in problems]
    right = _right(lm, asked, problems, lambda item, reply: arithmetic.is_correct(item[0], reply))
    for operation, name in NAMES.items():
        found[name] = _mean([r for (p, _), r in zip(problems, right, strict=True) if p.operation == operation])
    found["arithmetic, all of these"] = _mean(right)
    questions = miniature.held_out_facts()
    found["facts of the small world"] = _mean(
        _right(lm, [_ask(f.question) for f in questions], questions, facts.is_correct)
    )
    turns = miniature.held_out_jokes(knocks)
    answers = replies(lm, [k.messages for k in turns])
    pairs = list(zip(turns, answers, strict=True))
    found["knock-knock turns in the right form"] = _mean([jokes.is_in_form(k, reply) for k, reply in pairs])
    found["made-up names repeated to the letter"] = _mean(
        [jokes.is_correct(k, reply) for k, reply in pairs if k.expected[0].endswith(" who?")]
    )
    return found | {
        f"bits per byte, {kind}": bits_per_byte(lm, texts) for kind, texts in miniature.held_out_texts().items()
    }


def replies(lm: LM, chats: Sequence[Sequence[Message]], rows: int = 50) -> list[str]:
    """Greedy answers to conversations, several side by side."""
    answers: list[str] = []
    for start in range(0, len(chats), rows):
        prompts = [encode_chat(lm.text_tokenizer, chat) for chat in chats[start : start + rows]]
        answers += [completion.text for completion in lm.generate(prompts, max_new_tokens=220)]
    return answers


@torch.inference_mode()
def bits_per_byte(lm: LM, texts: Sequence[str], limit: int = 60_000) -> float:
    """Compression of the first `limit` characters of each text, read in stretches of one context."""
    nats, size = 0.0, 0
    for text in texts:
        ids = torch.tensor(lm.text_tokenizer.encode(text[:limit]))
        for start in range(0, len(ids) - 1, lm.context_length):
            part = ids[start : start + lm.context_length + 1]
            hidden = lm.model.hidden(part[None, :-1])[0]
            nats += token_losses(lm.model.head, hidden, part[1:], lm.config.vocab_size).sum().item()
        size += len(text[:limit].encode())
    return nats / math.log(2) / size


def _ask(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def _right(
    lm: LM, chats: Sequence[Sequence[Message]], items: Sequence[T], check: Callable[[T, str], bool]
) -> list[bool]:
    return [check(item, reply) for item, reply in zip(items, replies(lm, chats), strict=True)]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
