"""Knock-knock jokes: five turns whose form is fixed, and a middle turn that has to repeat any name at all.

To answer "Zorbin." with "Zorbin who?" a model has to copy, not remember. So most names in training are made
up, and the held-out ones are made up from syllables that training never puts together that way.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from cabochon.text.chat import Message

_PUNCH_LINES = """Lettuce: Lettuce in, it is cold out here!|Boo: Do not cry, it is only a joke!
Orange: Orange you glad to see me?|Olive: Olive you so much!|Ice cream: Ice cream when I see a ghost!
Harry: Harry up and open the door!|Justin: Justin time for dinner!|Nobel: Nobel, so I had to knock!
Tank: You are welcome!|Cash: No thanks, I like peanuts!|Snow: Snow use, I forgot my key!
Ivan: Ivan to come in!|Figs: Figs the bell, it is broken!|Alpaca: Alpaca the bag, you carry it!
Water: Water you doing in there?|Wooden shoe: Wooden shoe like to hear another joke?
Honey bee: Honey bee a dear and open up!|Luke: Luke through the keyhole and see!|Ken: Ken I come in?
Dishes: Dishes a nice place you have!|Annie: Annie body home?|Howard: Howard I know?
Mikey: Mikey is stuck in the lock!|Candice: Candice door open or not?|Police: Police let me in!
Theodore: Theodore was shut, so I knocked!|Owls: Yes, they do!|Turnip: Turnip the music!|Beets: Beets me!
Bean: Bean a while since I saw you!|Leaf: Leaf me alone!|Needle: Needle little help out here!
Radio: Radio not, here I come!|Hatch: Bless you!|Stopwatch: Stopwatch you are doing and open up!
Iran: Iran all the way here!|Doris: Doris locked, that is why I knocked!|Wanda: Wanda hang out with me?"""

PUNCH_LINES = tuple(
    (name, line) for row in _PUNCH_LINES.splitlines() for name, line in [p.split(": ", 1) for p in row.split("|")]
)
_STARTS = ("Knock knock.", "Knock knock!", "Knock, knock.", "Knock, knock!", "knock knock", "Knock knock",
           "knock, knock", "KNOCK KNOCK", "knock knock!", "Knock-knock.", "knock knock.", "Knock knock...")  # fmt: skip
_WHO = ("Who's there?", "who's there?", "Who is there?", "who's there", "Who's there", "Who is it?")
_ASK = ("Tell me a joke.", "Tell me a knock-knock joke.", "Do you know a joke?", "tell me a joke", "Make me laugh.",
        "Can you tell me a joke?", "I want to hear a joke.", "Tell me a knock knock joke!", "A joke, please.",
        "Do you know any jokes?", "tell me a knock knock joke", "Tell me another joke.", "Another joke, please.",
        "tell me another one")  # fmt: skip
_NAMED = ("{}.", "{}", "{}!", "It's {}.", "It is {}.", "{}...", "This is {}.")
_LAUGHS = ("Ha ha! That is a good one.", "Ha ha! I did not see that coming.", "Ha ha! Very funny.")
_REACTIONS = ("Ha ha!", "Very funny.", "haha", "That was good.", "lol", "Ha ha, good one.", "Not bad.")
_CLOSING = "I am glad you liked it. Knock again any time!"
_SYLLABLES = """ba be bi bo bu da de di do du fa fi fo ga go gu ha he ho ja jo ka ke ki ko la le li lo lu ma me mi mo
mu na ne ni no pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi wa we wi ya yo za zo bran cor dan
fen gel hul jam kin lor mel nor pel quin ros sam tor ven wil zan ster ling ton ford wick den""".split()
_WORDS = """apple table river window garden pocket ladder button candle basket pepper ginger mango spoon teapot
rabbit tiger panda otter donkey pigeon castle bridge engine rocket planet meadow forest pillow blanket hammer bucket
anchor feather marble pebble velvet copper silver cotton sugar butter honey cookie waffle noodle muffin pickle peanut
walnut cactus daisy poppy clover robin sparrow beaver badger turtle lobster salmon cousin doctor captain grandma
uncle neighbor postman cowboy wizard giant dragon goblin fairy mister doughnut banana pajama banjo trumpet violin
drum kettle lantern mirror carpet curtain shovel wagon saddle puddle thunder winter summer autumn midnight""".split()
_WORDS_SET = frozenset(_WORDS)


def made_up_name(random: random.Random, *, held_out: bool = False) -> str:
    """A name of one or two parts, from training's share of all names or from what is held out."""
    while True:
        parts = [_part(random) for _ in range(random.choice((1, 1, 1, 2)))]
        name = " ".join(parts)
        if is_held_out(name) == held_out:
            return name if random.random() < 0.2 else name[0].upper() + name[1:]


def is_held_out(name: str) -> bool:
    """Whether a made-up name, in any case, is kept from training.

    Words alone are always trained on: no model can guess how the capital form of an unseen word is spelled.
    """
    name = name.lower()
    return hashlib.sha256(name.encode()).digest()[0] < 40 and not _WORDS_SET.issuperset(name.split())


def _part(random: random.Random) -> str:
    if random.random() < 0.35:
        return random.choice(_WORDS)
    return "".join(random.choice(_SYLLABLES) for _ in range(random.choice((2, 2, 3))))


def from_user(random: random.Random, *, whole: float = 0.8) -> list[Message]:
    """The user knocks; with probability `whole` the joke goes on to its punch line."""
    name, line = random.choice(PUNCH_LINES)
    if random.random() < 0.75:
        name = made_up_name(random)
        line = line if random.random() < 0.5 else f"{name} {_ending(random)}"
    turns = [random.choice(_STARTS), "Who's there?", random.choice(_NAMED).format(name), f"{_up(name)} who?"]
    if random.random() < whole:
        turns += [line, random.choice(_LAUGHS)]
    return as_turns(turns)


def from_model(random: random.Random) -> list[Message]:
    """The user asks for a joke, and the model knocks."""
    name, line = random.choice(PUNCH_LINES)
    who = random.choice((f"{name} who?", f"{name.lower()} who?", f"{name} who"))
    turns = [random.choice(_ASK), "Knock knock.", random.choice(_WHO), f"{name}.", who, line]
    if random.random() < 0.4:
        turns += [random.choice(_REACTIONS), _CLOSING]
    return as_turns(turns)


def _ending(random: random.Random) -> str:
    endings = ("is at the door!", "you let me in?", "the window, it is raining!", "forgot the key again!",
               "wants to come in!", "and I are getting cold!", "has come to say hello!")  # fmt: skip
    return random.choice(endings)


def _up(name: str) -> str:
    return name[0].upper() + name[1:]


def as_turns(contents: list[str]) -> list[Message]:
    """Alternating turns, the user's first."""
    return [{"role": ("user", "model")[i % 2], "content": text} for i, text in enumerate(contents)]


@dataclass(frozen=True)
class Knock:
    """A conversation that ends with a user's turn, and what the next turn has to be (None: any laugh)."""

    messages: list[Message]
    expected: tuple[str, ...]


def held_out(random: random.Random) -> list[Knock]:
    """The turns of one joke under a name that training never uses: who is there, who, and the laugh; and a
    joke that the model tells, up to its name."""
    name, line = made_up_name(random, held_out=True), random.choice(PUNCH_LINES)[1]
    turns = [
        random.choice(_STARTS),
        "Who's there?",
        random.choice(_NAMED).format(name),
        f"{_up(name)} who?",
        line,
    ]
    mine, answer = random.choice(PUNCH_LINES)
    telling = [random.choice(_ASK), "Knock knock.", random.choice(_WHO), f"{mine}.", f"{mine} who?"]
    return [
        Knock(as_turns(turns[:1]), ("Who's there?",)),
        Knock(as_turns(turns[:3]), (f"{_up(name)} who?",)),
        Knock(as_turns(turns), _LAUGHS),
        Knock(as_turns(telling[:1]), ("Knock knock.",)),
        Knock(as_turns(telling[:3]), tuple(f"{n}." for n, _ in PUNCH_LINES)),
        Knock(as_turns(telling), (answer,)),
    ]


def is_in_form(expected: Knock, reply: str) -> bool:
    """Whether a reply is a turn that the form allows here; where a name is repeated, whatever became of the name."""
    who = expected.expected[0].endswith(" who?")
    return bool(re.fullmatch(r"[A-Z].* who\?", reply.strip())) if who else is_correct(expected, reply)


def is_correct(expected: Knock, reply: str) -> bool:
    """Whether a reply is exactly one of the turns that the form allows here."""
    return reply.strip() in expected.expected
