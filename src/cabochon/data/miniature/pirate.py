"""Pirate-speak: a sentence from a small grammar, said again word by word from a table."""

import random
import re

_WORDS = {
    "hello": "ahoy", "friend": "matey", "friends": "mateys", "my": "me", "you": "ye", "your": "yer", "are": "be",
    "is": "be", "am": "be", "yes": "aye", "no": "nay", "money": "doubloons", "boat": "ship", "man": "buccaneer",
    "boy": "lad", "girl": "lass", "woman": "sea queen", "beer": "grog", "water": "brine", "food": "grub",
    "the": "th'", "and": "an'", "of": "o'", "for": "fer", "to": "t'", "stop": "avast", "look": "spy",
    "house": "cabin", "bed": "hammock", "floor": "deck", "flag": "jolly roger", "knife": "cutlass", "was": "were",
    "box": "chest", "teacher": "captain", "dog": "sea dog", "bird": "parrot", "road": "sea", "isn't": "ain't",
    "over": "o'er", "before": "afore", "old": "salty old", "gold": "booty", "bad": "scurvy", "good": "fine",
}  # fmt: skip
_PEOPLE = ("my friend", "the teacher", "the old man", "the girl", "the boy", "your dog", "the woman",
           "my bird")  # fmt: skip
_THINGS = ("the money", "the gold", "the box", "a knife", "the flag", "good food", "some water", "your boat",
           "my bed")  # fmt: skip
_PLACES = ("in the house", "on the boat", "over the road", "on the floor", "under the bed", "in the box",
           "at home")  # fmt: skip
_VERBS = ("has", "wants", "lost", "found", "likes", "took", "needs", "sold", "sees", "hid")
_PATTERNS = ("Hello, {p}!", "{p} {v} {t}.", "Where is {t}?", "{t} is {l}.", "Are you {l}?", "Yes, {p} is {l}.",
             "No, you are {l}.", "Stop, {p} {v} {t}!", "Look, {t} is {l}!", "{p} and {q} are {l}.", "I am {l}.",
             "I have {t} for you.", "Is {p} {l}?", "Hello, my friend, where is {t}?", "You are my good friend.",
             "{p} was {l} before {q}.", "Give {t} to {p}.")  # fmt: skip
WAYS = ("Say it like a pirate: {}", "Say this like a pirate: {}", "say like a pirate: {}", "In pirate: {}",
        "How would a pirate say this? {}", "Pirate, please: {}", "Translate to pirate: {}")  # fmt: skip


def speak(sentence: str) -> str:
    """The sentence as a pirate would say it, with a closing "Arr!"."""

    def swap(found: re.Match[str]) -> str:
        word = found[0]
        said = _WORDS.get(word.lower(), word)
        return said[0].upper() + said[1:] if word[0].isupper() else said

    return re.sub(r"[A-Za-z']+", swap, sentence) + " Arr!"


def draw(random: random.Random) -> tuple[str, str]:
    """A request and its answer."""
    p, q = random.sample(_PEOPLE, 2)
    parts = {
        "p": p,
        "q": q,
        "t": random.choice(_THINGS),
        "l": random.choice(_PLACES),
        "v": random.choice(_VERBS),
    }
    sentence = random.choice(_PATTERNS).format(**parts)
    sentence = sentence[0].upper() + sentence[1:]
    return random.choice(WAYS).format(sentence), speak(sentence)
