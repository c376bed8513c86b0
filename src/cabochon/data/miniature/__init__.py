"""The miniature corpus: what the model inside is trained and tested on, rebuilt on any machine from a seed.

- `pretraining_documents`: code and prose of Python's own library, and the exercises as running text
- `conversations`: the exercises as chats: sums with their working, facts, jokes, pirate-speak, manners
- `held_out_*`: what training never sees; the modules of the exercises have the checkers for replies
"""

import random
from collections.abc import Iterator

from cabochon.data.miniature import arithmetic, facts, jokes, pirate, smalltalk, source
from cabochon.text.chat import Message

# Shares of single exchanges in chats and in running text.
SHARES = {"arithmetic": 52, "facts": 24, "pirate": 9, "smalltalk": 15}


def conversations(seed: int, *, jokes_share: float = 0.21) -> Iterator[list[Message]]:
    """An endless stream of chats. One in five is a joke, one in six strings several exchanges together."""
    random_ = random.Random(f"conversations {seed}")
    while True:
        kind = random_.random()
        if kind < 0.76 * jokes_share:
            yield jokes.from_user(random_)
        elif kind < jokes_share:
            yield jokes.from_model(random_)
        elif kind < jokes_share + 0.17:
            yield _mixed(random_)
        else:
            yield jokes.as_turns(list(exchange(random_)))


def _mixed(random_: random.Random) -> list[Message]:
    """Two to five exchanges after one another, one in eight of them a joke."""
    talk: list[Message] = []
    for _ in range(random_.choice((2, 2, 3, 4, 5))):
        if random_.random() < 0.125:
            talk += _joke(random_)
        else:
            talk += jokes.as_turns(list(exchange(random_)))
    return talk


def _joke(random_: random.Random) -> list[Message]:
    return jokes.from_user(random_, whole=1) if random_.random() < 0.6 else jokes.from_model(random_)


def exchange(random_: random.Random) -> tuple[str, str]:
    """One question and its answer, of any kind but jokes."""
    kind = random_.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "arithmetic":
        problem, way = arithmetic.draw(random_)
        return problem.question(way), problem.working()
    if kind == "facts":
        fact = facts.draw(random_)
        return fact.question, fact.answer
    return pirate.draw(random_) if kind == "pirate" else smalltalk.draw(random_)


def pretraining_documents(seed: int) -> Iterator[str]:
    """An endless shuffle: by tokens about a third each of code, prose, and exercises as running text."""
    random_ = random.Random(f"pretraining {seed}")
    code, prose = (_training_pieces(texts) for texts in (source.code_files(), source.prose()))
    while True:
        random_.shuffle(code)
        for text in code:
            yield text
            yield from random_.choices(prose, k=4)
            yield from (_page(random_) for _ in range(8))


def _page(random_: random.Random) -> str:
    """Some exercises of one kind as plain text."""
    kind = random_.random()
    if kind < 0.2:
        return " ".join(random_.sample(facts.statements(), 8))
    if kind < 0.35:
        return "\n".join(f"- {turn['content']}" for turn in _joke(random_))
    pairs = [exchange(random_) for _ in range(3)]
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)


def _training_pieces(texts: dict[str, str]) -> list[str]:
    return [piece for name, text in texts.items() if not source.is_held_out(name) for piece in _pieces(text)]


def _pieces(text: str, size: int = 3000) -> list[str]:
    """A long text cut at ends of lines into pieces of about `size` characters."""
    pieces, start = [], 0
    while len(text) - start > size:
        cut = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def held_out_arithmetic(count: int, seed: int = 0) -> list[tuple[arithmetic.Problem, int]]:
    """Problems, each with a way of asking, that training never sees together; results are not negative."""
    random_ = random.Random(f"held-out arithmetic {seed}")
    return [arithmetic.draw(random_, held_out=True, negative=0) for _ in range(count)]


def held_out_facts() -> list[facts.Fact]:
    """Every (fact, way of asking) pair that training never sees."""
    return facts.held_out()


def held_out_jokes(count: int, seed: int = 0) -> list[jokes.Knock]:
    """Six turns each of so many jokes under names that training never uses."""
    random_ = random.Random(f"held-out jokes {seed}")
    return [turn for _ in range(count) for turn in jokes.held_out(random_)]


def held_out_texts() -> dict[str, list[str]]:
    """Code and prose for perplexity."""
    return {
        "code": [text for name, text in source.code_files().items() if source.is_held_out(name)],
        "prose": [text for name, text in source.prose().items() if source.is_held_out(name)],
    }
