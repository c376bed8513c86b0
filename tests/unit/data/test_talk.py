import random

import pytest

from cabochon.data.miniature import pirate, smalltalk
from cabochon.model.config import Gemma2Config


@pytest.mark.parametrize(
    ("said", "by_a_pirate"),
    [
        ("Hello, my friend, where is the gold?", "Ahoy, me matey, where be th' booty? Arr!"),
        ("You are my good friend.", "Ye be me fine matey. Arr!"),
        ("The parrot flies.", "Th' parrot flies. Arr!"),
        ("", " Arr!"),
    ],
)
def test_pirates_swap_word_by_word(said: str, by_a_pirate: str) -> None:
    assert pirate.speak(said) == by_a_pirate


def test_a_pirate_says_exactly_what_was_asked() -> None:
    source = random.Random(0)
    for _ in range(300):
        request, answer = pirate.draw(source)
        assert any(answer == pirate.speak(request[way.index("{") :]) for way in pirate.WAYS)


def test_no_slot_is_left_open() -> None:
    source = random.Random(0)
    for _ in range(1000):
        assert not set("{}") & set("".join((*smalltalk.draw(source), *pirate.draw(source))))


def test_the_model_knows_its_size() -> None:
    millions = Gemma2Config.preset("tiny").num_parameters / 1e6
    assert f"{millions:.1f} million" in smalltalk.ABOUT
