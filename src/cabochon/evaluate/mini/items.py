"""The items of the mini suite, by task: plain dictionaries, as they are written to JSON lines."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cabochon.data import miniature
from cabochon.data.miniature import arithmetic, facts, jokes, source

Item = dict[str, Any]
Splits = dict[str, list[Item]]

SHOTS = 8  # examples to choose from
COUNTS = {"arithmetic": 500, "completion": 500, "pronouns": 500, "jokes": 75, "code": 400, "prose": 400}
DRAWS = 2  # sets of choices for each held-out question: there are no more questions
PIECE = 400  # characters of a text whose perplexity is measured


def make(seed: int) -> dict[str, Splits]:
    """Train (for examples) and test items of every task."""
    makers: dict[str, Callable[[random.Random], Splits]] = {
        "arithmetic": _arithmetic, "facts": _facts, "completion": _completion, "pronouns": _pronouns,
        "knock": _knock, "code": _code, "prose": _prose,
    }  # fmt: skip
    return {name: maker(random.Random(f"mini {name} {seed}")) for name, maker in makers.items()}


def _arithmetic(draw: random.Random) -> Splits:
    def item(problem: arithmetic.Problem, way: int) -> Item:
        return {
            "question": problem.question(way),
            "working": problem.working(),
            "result": str(problem.result),
            "problem": [problem.operation, problem.a, problem.b, way],
        }

    train = [item(*arithmetic.draw(draw, negative=0)) for _ in range(SHOTS)]
    test: dict[str, Item] = {}
    while len(test) < COUNTS["arithmetic"]:
        one = item(*arithmetic.draw(draw, held_out=True, negative=0))
        test[one["question"]] = one
    return {"train": train, "test": list(test.values())}


def _facts(draw: random.Random) -> Splits:
    def item(kind: facts.Kind, pair: facts.Pair, way: int) -> Item:
        fact = facts.fact(kind, pair, way)
        # What else the same table could say of this subject; a fact may be there twice, as the number of legs is.
        true = {y for x, y in kind.pairs if x == pair[0]}
        wrong = sorted({y for _, y in kind.pairs} - true)
        chosen = [facts.fact(kind, (pair[0], y), way).answer for y in draw.sample(wrong, 3)]
        gold = draw.randrange(4)
        chosen.insert(gold, fact.answer)
        return {"question": fact.question, "choices": chosen, "gold": gold, "fact": [kind.name, pair[0], way]}

    known: list[tuple[facts.Kind, facts.Pair, int]] = []
    unknown: list[tuple[facts.Kind, facts.Pair, int]] = []
    for kind, pair in facts.FACTS:
        if len({y for _, y in kind.pairs}) >= 4:
            for way in range(len(kind.questions)):
                (unknown if facts.is_held_out(kind, pair, way) else known).append((kind, pair, way))
    test = [item(*asked) for _ in range(DRAWS) for asked in unknown]
    return {"train": [item(*asked) for asked in draw.sample(known, SHOTS)], "test": test}


def _completion(draw: random.Random) -> Splits:
    """Sentences cut in two; the wrong endings are those of other sentences."""

    def items(sentences: Sequence[str], count: int) -> list[Item]:
        halves = [(" ".join(w[: -(len(w) // 2)]), " ".join(w[-(len(w) // 2) :])) for w in map(str.split, sentences)]
        made = []
        for number, (begun, ending) in enumerate(halves[:count]):
            near = sorted(range(len(halves)), key=lambda n: abs(len(halves[n][1]) - len(ending)))
            others = [halves[n][1] for n in near if n != number and halves[n][1] != ending][:9]
            choices = draw.sample(others, 3)
            gold = draw.randrange(4)
            choices.insert(gold, ending)
            made.append({"begun": begun, "choices": choices, "gold": gold})
        return made

    trained = [text for name, text in source.prose().items() if not source.is_held_out(name)]
    known, unknown = (list(dict.fromkeys(_sentences(texts))) for texts in (trained, _unseen_prose()))
    draw.shuffle(known)
    draw.shuffle(unknown)
    return {"train": items(known[:200], SHOTS), "test": items(unknown, COUNTS["completion"])}


# What is said of two things, and of which of them it is true; {x} is the one, {y} what is known of it.
_PRONOUNS = {
    "sound": ("A {a} met a {b}, and then the {x}", "said {y}."),
    "home": ("The {a} left the {b}, since a {x}", "lives in a {y}."),
    "young": ("The {a} and the {b} had young. That of the {x}", "is called a {y}."),
    "legs": ("The {a} walked with the {b}. The {x}", "has {y} legs."),
    "color of a": ("A {a} lay beside a {b}. Only the {x}", "was {y}."),
    "capital": ("He went from {a} to {b}. In {x}", "he saw {y}."),
    "sides": ("She drew a {a} and a {b}. The {x}", "has {y} sides."),
}


def _pronouns(draw: random.Random) -> Splits:
    def item() -> Item:
        kind = draw.choice([kind for kind in facts.KINDS if kind.name in _PRONOUNS])
        (first, known), (second, _) = draw.sample(kind.pairs, 2)
        same = {y for x, y in kind.pairs if x == second}
        if known in same or first == second:
            return item()
        begun, ending = _PRONOUNS[kind.name]
        a, b = draw.sample((first, second), 2)
        gold = draw.randrange(2)
        options = [second]
        options.insert(gold, first)
        contexts = [_articles(begun.format(a=a, b=b, x=x)) for x in options]
        return {"contexts": contexts, "gold": gold, "ending": _articles(ending.format(y=known))}

    made = {item["contexts"][item["gold"]] + item["ending"]: item for item in (item() for _ in range(2000))}
    found = list(made.values())
    return {"train": found[:SHOTS], "test": found[SHOTS : SHOTS + COUNTS["pronouns"]]}


def _articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _knock(draw: random.Random) -> Splits:
    def item(knock: jokes.Knock) -> Item:
        said = "\n".join(f"- {turn['content']}" for turn in knock.messages)
        return {"said": f"{said}\n-", "expected": list(knock.expected)}

    train: list[Item] = []
    while len(train) < SHOTS:
        talk = jokes.from_user(draw, whole=1)
        train.append(item(jokes.Knock(talk[:3], (talk[3]["content"],))))
    turns = [turn for _ in range(COUNTS["jokes"]) for turn in jokes.held_out(draw)]
    test = {one["said"]: one for one in map(item, turns)}
    return {"train": train, "test": list(test.values())}


def _code(draw: random.Random) -> Splits:
    known = [text for name, text in source.code_files().items() if not source.is_held_out(name)]
    return _pieces(draw, known, miniature.held_out_texts()["code"], COUNTS["code"])


def _prose(draw: random.Random) -> Splits:
    known = [text for name, text in source.prose().items() if not source.is_held_out(name)]
    return _pieces(draw, known, _unseen_prose(), COUNTS["prose"])


def _pieces(draw: random.Random, known: Sequence[str], unknown: Sequence[str], count: int) -> Splits:
    train, test = ([piece for text in texts for piece in _cut(text)] for texts in (known, unknown))
    return {
        "train": [{"text": piece} for piece in draw.sample(train, 200)],
        "test": [{"text": piece} for piece in draw.sample(test, min(count, len(test)))],
    }


def _cut(text: str) -> Iterator[str]:
    """Whole lines of about `PIECE` characters together."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece.strip("\n")
            piece = ""
    if len(piece.strip()) >= PIECE // 4:
        yield piece.strip("\n")


def _unseen_prose() -> list[str]:
    """What is held out, and the docstrings of files that training leaves out because they are long."""
    return [*miniature.held_out_texts()["prose"], *source.docstrings_of_long_files()]


def _sentences(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
            if 8 <= len(sentence.split()) <= 30 and re.fullmatch(r"[A-Z][\w\s,;:'\"()\-/=.]+\.", sentence):
                yield sentence
