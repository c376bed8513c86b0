"""The model inside in 8 and 4 bits against its bfloat16 weights computed in float32, on what training never saw.

Held out are conversations (sums, facts, jokes; what the model says in them) and texts (code and prose), about as many
tokens of each. Agreement is the share of positions where both find the same token likeliest.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import cabochon
from cabochon.data import miniature
from cabochon.data.format import chat_example, text_example
from cabochon.data.miniature.jokes import as_turns
from cabochon.data.pack import Example
from cabochon.lm.quantize import quantize
from cabochon.model.gemma2 import Gemma2
from cabochon.text.chat import Message
from cabochon.weights.folder import load_model
from cabochon.weights.hub import built_in
from cabochon.weights.scheme import Scheme

TEXT_TOKENS = 6000  # of code, and as many of prose


@dataclass(frozen=True)
class Run:
    """What a model makes of the held-out tokens: its likeliest next token at each, and the perplexity of them all."""

    likeliest: Tensor
    perplexity: float

    def agreement(self, other: "Run") -> float:
        return float((self.likeliest == other.likeliest).float().mean())


def conversations() -> Iterator[list[Message]]:
    for problem, way in miniature.held_out_arithmetic(120):
        yield as_turns([problem.question(way), problem.working()])
    for fact in miniature.held_out_facts():
        yield as_turns([fact.question, fact.answer])
    for knock in miniature.held_out_jokes(40):
        if len(knock.expected) == 1:  # where the form leaves no choice
            yield [*knock.messages, {"role": "model", "content": knock.expected[0]}]


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    tokenizer = cabochon.load(device="cpu").text_tokenizer
    found = [chat_example(tokenizer, chat) for chat in conversations()]
    for texts in miniature.held_out_texts().values():
        count = 0
        for text in texts:
            example = text_example(tokenizer, text)
            found.append(Example(example.ids[:1000], example.learned[:1000]))
            count += len(found[-1].ids)
            if count > TEXT_TOKENS:
                break
    return found


@torch.inference_mode()
def run(model: Gemma2, examples: list[Example]) -> Run:
    nats, likeliest = 0.0, []
    for example in examples:
        ids, learned = torch.tensor(example.ids), torch.tensor(example.learned)[1:]
        logits = model(ids[None, :-1])[0][learned]
        nats += cross_entropy(logits, ids[1:][learned], reduction="sum").item()
        likeliest.append(logits.argmax(-1))
    tokens = torch.cat(likeliest)
    return Run(tokens, math.exp(nats / len(tokens)))


@pytest.fixture(scope="module")
def truth(held_out: list[Example]) -> Run:
    return run(load_model(built_in(), dtype=torch.float32), held_out)


@pytest.mark.slow
def test_eight_bits(held_out: list[Example], truth: Run) -> None:
    eight = run(load_model(built_in(), weights="int8"), held_out)
    assert len(truth.likeliest) > 20_000
    assert eight.agreement(truth) >= 0.99
    assert abs(eight.perplexity / truth.perplexity - 1) < 0.005


@pytest.mark.slow
def test_four_bits(held_out: list[Example], truth: Run, tmp_path: Path) -> None:
    """Calibrated, they get back at least half of what rounding to the nearest loses."""
    quantize(built_in(), tmp_path / "q", Scheme(4, 64, "gptq", 8))
    calibrated = run(load_model(tmp_path / "q"), held_out)
    nearest = run(load_model(built_in(), weights="int4"), held_out)
    loss, loss_of_nearest = (r.perplexity / truth.perplexity - 1 for r in (calibrated, nearest))
    assert loss_of_nearest > 0.005  # else there is nothing to get back
    assert loss < 0.03 and loss < loss_of_nearest / 2
    assert calibrated.agreement(truth) > nearest.agreement(truth)


@pytest.mark.slow
def test_it_is_the_calibration_that_helps(held_out: list[Example], truth: Run, tmp_path: Path) -> None:
    """The same bits for every matrix, rounded to the nearest: what is left is GPTQ's own part."""
    losses = []
    for method in ("rtn", "gptq"):
        quantize(built_in(), tmp_path / method, Scheme(4, 64, method, 8))
        losses.append(run(load_model(tmp_path / method), held_out).perplexity / truth.perplexity - 1)
    assert losses[1] < 0.7 * losses[0]
