"""The model inside still does what its card says, on items that its training never saw."""

import json

import pytest

import cabochon
from cabochon.lm import LM
from cabochon.recipe.score import score
from cabochon.weights.hub import built_in

REQUIRED = {
    "addition up to 999": 0.9,
    "subtraction up to 999": 0.9,
    "times tables up to 12": 0.9,
    "facts of the small world": 0.95,
    "knock-knock turns in the right form": 1.0,
    "made-up names repeated to the letter": 0.9,
}


@pytest.fixture(scope="module")
def lm() -> LM:
    return cabochon.load(device="cpu")


@pytest.mark.slow
def test_all_scores(lm: LM) -> None:
    """As `make tiny` measured them; another processor may round a close call differently."""
    found = score(lm)
    told = json.loads((built_in() / "scores.json").read_text())
    for name, least in REQUIRED.items():
        assert found[name] >= least, name
        assert found[name] == pytest.approx(told[name], abs=0.03), name
    for name in ("bits per byte, code", "bits per byte, prose"):
        assert found[name] == pytest.approx(told[name], rel=0.05) and found[name] < 3, name


def test_the_card_states_these_scores() -> None:
    card, told = (built_in() / "README.md").read_text(), json.loads((built_in() / "scores.json").read_text())
    for name, value in told.items():
        shown = f"{value:.2f}" if name.startswith("bits") else f"{value:.1%}"
        assert f"| {name} | {shown} |" in card
    assert all(told[name] >= least for name, least in REQUIRED.items())


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 12 + 30?", "42"),
        ("347 + 586", "933"),
        ("What is 512 - 17?", "495"),
        ("7 times 8", "56"),
        ("What is the capital of France?", "Paris"),
        ("Knock knock.", "Who's there?"),
    ],
)
def test_a_first_conversation(lm: LM, question: str, answer: str) -> None:
    assert answer in lm.chat([{"role": "user", "content": question}], max_new_tokens=150).text
