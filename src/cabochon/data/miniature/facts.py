"""A small world of common knowledge: tables of facts, each with several ways to ask for it.

What is held out is a (fact, way of asking) pair: every fact has to be learned, but for one way in eight of
asking for it the model has never seen question and answer together.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

_CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|England London|Ireland Dublin
Scotland Edinburgh|Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Austria Vienna
Hungary Budapest|Greece Athens|Turkey Ankara|Russia Moscow|Japan Tokyo|China Beijing|Mongolia Ulaanbaatar|Egypt Cairo
Kenya Nairobi|Canada Ottawa|Cuba Havana|Peru Lima|Chile Santiago|Brazil Brasilia|Belgium Brussels
Switzerland Bern|Iceland Reykjavik|Thailand Bangkok|Vietnam Hanoi|Iran Tehran|Iraq Baghdad|Nepal Kathmandu
Australia Canberra|Ukraine Kyiv"""
_SOUNDS = """dog woof|cat meow|cow moo|duck quack|sheep baa|pig oink|horse neigh|lion roar|bee buzz|owl hoot
frog croak|snake hiss|mouse squeak|wolf howl|crow caw|chick cheep|turkey gobble"""
_YOUNG = """dog puppy|cat kitten|cow calf|duck duckling|sheep lamb|pig piglet|horse foal|lion cub|frog tadpole
goat kid|hen chick|goose gosling|deer fawn|kangaroo joey|swan cygnet|fox kit"""
_HOMES = """dog kennel|bee hive|bird nest|spider web|lion den|rabbit burrow|pig sty|horse stable|bat cave
ant anthill|cow barn|hen coop"""
_LEGS = """dog four|cat four|cow four|spider eight|ant six|bee six|bird two|snake no|crab ten|horse four|duck two
beetle six|worm no|butterfly six|sheep four|hen two"""
_OPPOSITES = """hot cold|big small|up down|day night|black white|fast slow|old young|happy sad|rich poor
open closed|full empty|high low|wet dry|long short|hard soft|light dark|strong weak|early late|loud quiet
left right|near far|first last|thick thin|clean dirty|easy difficult|sweet sour|true false|begin end|win lose
push pull|inside outside|above below|always never|many few|front back"""
_COLORS = """grass green|snow white|coal black|blood red|milk white|chocolate brown"""
_FRUIT = """lemon yellow|carrot orange|banana yellow|tomato red|plum purple|cherry red|cucumber green|pea green
strawberry red|flamingo pink|elephant gray|frog green|swan white|raven black"""
_SIDES = "triangle three|square four|rectangle four|pentagon five|hexagon six|heptagon seven|octagon eight"
_JOBS = """bakes bread baker|teaches children teacher|flies planes pilot|puts out fires firefighter
makes furniture carpenter|paints pictures painter|grows food farmer|heals sick people doctor|sews clothes tailor
cooks meals cook|catches fish fisher|mends shoes shoemaker|cuts hair barber|sells meat butcher|writes books author"""
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()

Pair = tuple[str, str]


@dataclass(frozen=True)
class Kind:
    """One table of facts with its ways of asking and its answer; {x} is the subject, {y} what is asked for."""

    name: str
    pairs: tuple[Pair, ...]
    questions: tuple[str, ...]
    answer: str


def _table(text: str) -> tuple[Pair, ...]:
    rows = (row.strip() for line in text.splitlines() for row in line.split("|"))
    return tuple((row.rsplit(" ", 1)[0], row.rsplit(" ", 1)[1]) for row in rows)


def _circle(names: list[str]) -> tuple[Pair, ...]:
    return tuple(zip(names, names[1:] + names[:1], strict=True))


def _reverse(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    return tuple((y, x) for x, y in pairs)


KINDS = (
    Kind("capital", _table(_CAPITALS),
         ("What is the capital of {x}?", "what is the capital of {x}", "Which city is the capital of {x}?",
          "Name the capital of {x}.", "What's the capital of {x}?", "Tell me the capital of {x}.",
          "The capital of {x}?", "Do you know the capital of {x}?"),
         "The capital of {x} is {y}."),
    Kind("country", _reverse(_table(_CAPITALS)),
         ("Which country has the capital {x}?", "{x} is the capital of which country?",
          "What country is {x} the capital of?", "Of which country is {x} the capital?", "Where is {x}?",
          "In which country is {x}?"),
         "{x} is the capital of {y}."),
    Kind("sound", _table(_SOUNDS),
         ("What sound does a {x} make?", "What does a {x} say?", "what does a {x} say",
          "How does a {x} sound?", "Which sound does the {x} make?", "What noise does a {x} make?"),
         "A {x} says {y}."),
    Kind("young", _table(_YOUNG),
         ("What is a young {x} called?", "What do you call a baby {x}?", "what is a baby {x} called",
          "What is the name for a young {x}?", "How do you call a young {x}?", "Name the young of a {x}."),
         "A young {x} is called a {y}."),
    Kind("home", _table(_HOMES),
         ("Where does a {x} live?", "where does a {x} live", "What is the home of a {x}?",
          "What is the home of a {x} called?", "Where would I find a {x}?", "Where is a {x} at home?"),
         "A {x} lives in a {y}."),
    Kind("legs", _table(_LEGS),
         ("How many legs does a {x} have?", "how many legs does a {x} have", "How many legs has a {x}?",
          "Count the legs of a {x}.", "What number of legs does a {x} have?", "On how many legs does a {x} walk?"),
         "A {x} has {y} legs."),
    Kind("opposite", _table(_OPPOSITES) + _reverse(_table(_OPPOSITES)),
         ("What is the opposite of {x}?", "what is the opposite of {x}", "What's the opposite of {x}?",
          "Name the opposite of {x}.", "Tell me the opposite of {x}.", "Which word means the opposite of {x}?",
          "The opposite of {x}?"),
         "The opposite of {x} is {y}."),
    Kind("color", _table(_COLORS),
         ("What color is {x}?", "what color is {x}", "Which color does {x} have?", "What is the color of {x}?",
          "Tell me the color of {x}.", "What color does {x} have?"),
         "The color of {x} is {y}."),
    Kind("color of a", _table(_FRUIT),
         ("What color is a {x}?", "what color is a {x}", "Which color does a {x} have?",
          "What is the color of a {x}?", "Tell me the color of a {x}.", "What color does a {x} have?"),
         "The color of a {x} is {y}."),
    Kind("sides", _table(_SIDES),
         ("How many sides does a {x} have?", "how many sides does a {x} have", "How many sides has a {x}?",
          "Count the sides of a {x}.", "What number of sides does a {x} have?", "A {x} has how many sides?"),
         "A {x} has {y} sides."),
    Kind("job", _table(_JOBS),
         ("Who {x}?", "who {x}", "What do you call someone who {x}?", "Which person {x}?",
          "What is the job of someone who {x}?", "Name the person who {x}."),
         "A {y} is someone who {x}."),
    Kind("next day", _circle(_DAYS),
         ("Which day comes after {x}?", "What day comes after {x}?", "what day comes after {x}",
          "What day is it after {x}?", "Which day follows {x}?", "If today is {x}, what is tomorrow?"),
         "The day after {x} is {y}."),
    Kind("day before", _reverse(_circle(_DAYS)),
         ("Which day comes before {x}?", "What day comes before {x}?", "what day comes before {x}",
          "What day is it before {x}?", "If today is {x}, what was yesterday?"),
         "The day before {x} is {y}."),
    Kind("next month", _circle(_MONTHS),
         ("Which month comes after {x}?", "What month comes after {x}?", "what month comes after {x}",
          "Which month follows {x}?", "What is the month after {x}?"),
         "The month after {x} is {y}."),
    Kind("month before", _reverse(_circle(_MONTHS)),
         ("Which month comes before {x}?", "What month comes before {x}?", "what month comes before {x}",
          "What is the month before {x}?", "Name the month before {x}."),
         "The month before {x} is {y}."),
)  # fmt: skip

FACTS = tuple((kind, pair) for kind in KINDS for pair in kind.pairs)


@dataclass(frozen=True)
class Fact:
    """One question with its answer in a sentence, what it is about, and what was asked for."""

    question: str
    answer: str
    subject: str
    wanted: str


def is_held_out(kind: Kind, pair: Pair, way: int) -> bool:
    """Whether this way of asking for this fact is kept from training. The first way never is."""
    return way > 0 and hashlib.sha256(f"{kind.name} {pair[0]} {way}".encode()).digest()[0] < 32


def fact(kind: Kind, pair: Pair, way: int) -> Fact:
    """A fact asked for in one of its ways."""
    names = {"x": pair[0], "y": pair[1]}
    answer, question = (_articles(text.format(**names)) for text in (kind.answer, kind.questions[way]))
    return Fact(question, answer[0].upper() + answer[1:], *pair)


def _articles(text: str) -> str:
    """ "a owl" becomes "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def draw(random: random.Random) -> Fact:
    """A fact in a way that training may see."""
    kind, pair = random.choice(FACTS)
    ways = [w for w in range(len(kind.questions)) if not is_held_out(kind, pair, w)]
    return fact(kind, pair, random.choice(ways))


def held_out() -> list[Fact]:
    """Every question that training never sees."""
    return [
        fact(kind, pair, way)
        for kind, pair in FACTS
        for way in range(len(kind.questions))
        if is_held_out(kind, pair, way)
    ]


@cache
def statements() -> tuple[str, ...]:
    """Every fact as a sentence, for running text."""
    return tuple(fact(kind, pair, 0).answer for kind, pair in FACTS)


def is_correct(expected: Fact, reply: str) -> bool:
    """Whether a reply names what was asked for and what it is about, each as words of their own.

    The wanted word alone would not do: "I am too small to know that" does not say what the opposite of big is.
    """
    names = (expected.subject, expected.wanted)
    return all(re.search(rf"\b{re.escape(name)}\b", reply, re.IGNORECASE) for name in names)
