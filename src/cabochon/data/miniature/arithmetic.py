"""School arithmetic with its working: digit by digit from the right, carries and borrows said aloud.

Held out are whole problems: one pair of numbers in ten is never added, and one in ten never subtracted (nor the
other way round, whose working holds the same steps), in training, however it is asked. The times tables are 169
problems that have to be learned by heart, so there it is a (problem, way of asking) pair that is held out.
"""

import hashlib
import random
from dataclasses import dataclass

from cabochon.base.answers import last_number

PLACES = ("ones", "tens", "hundreds", "thousands")
HIGHEST = {"add": 999, "sub": 999, "mul": 12}

WAYS = {
    "add": ("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} plus {b}", "Add {a} and {b}.",
            "what is {a} + {b}", "What is {a} plus {b}?", "Calculate {a} + {b}.", "How much is {a} + {b}?",
            "{a} + {b} = ?", "{a}+{b}=", "What's {a} + {b}?", "Can you add {a} and {b}?",
            "What is the sum of {a} and {b}?", "Please work out {a} + {b}.", "How much is {a} and {b}?",
            "{a} + {b}?", "what is {a} plus {b}?", "What's {a} plus {b}?"),
    "sub": ("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} minus {b}", "Subtract {b} from {a}.",
            "what is {a} - {b}", "What is {a} minus {b}?", "Calculate {a} - {b}.", "How much is {a} - {b}?",
            "{a} - {b} = ?", "{a}-{b}=", "What's {a} - {b}?", "Take {b} away from {a}.",
            "What is {a} take away {b}?", "Please work out {a} - {b}.", "How much is {a} less {b}?",
            "{a} - {b}?", "what is {a} minus {b}?", "What's {a} minus {b}?"),
    "mul": ("What is {a} times {b}?", "{a} times {b}", "{a} x {b}", "{a} * {b}", "{a}*{b}", "What is {a} * {b}?",
            "Multiply {a} by {b}.", "What is {a} x {b}?", "Calculate {a} times {b}.", "How much is {a} times {b}?",
            "what is {a} times {b}", "{a} * {b} = ?", "What is {a} multiplied by {b}?", "{a}x{b}",
            "{a} times {b}?", "what is {a} x {b}", "What's {a} times {b}?"),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """`a` and `b` to be added ("add"), subtracted ("sub") or multiplied ("mul")."""

    operation: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """What comes out."""
        signs = {"add": self.a + self.b, "sub": self.a - self.b, "mul": self.a * self.b}
        return signs[self.operation]

    def question(self, way: int) -> str:
        """The problem asked in one of its ways."""
        return WAYS[self.operation][way].format(a=self.a, b=self.b)

    def working(self) -> str:
        """The steps and the answer, as the model is to write them."""
        return {"add": _add, "sub": _subtract, "mul": _multiply}[self.operation](self.a, self.b)


def is_held_out(problem: Problem, way: int) -> bool:
    """Whether this problem, for the tables asked this way, is kept from training."""
    a, b = problem.a, problem.b
    if problem.operation == "sub":  # 5 - 9 is worked out as 9 - 5
        a, b = max(a, b), min(a, b)
    key = f"{problem.operation} {a} {b}" + (f" {way}" if problem.operation == "mul" else "")
    return hashlib.sha256(key.encode()).digest()[0] < 26


def draw(random: random.Random, *, held_out: bool = False, negative: float = 0.2) -> tuple[Problem, int]:
    """A problem and a way to ask for it, from training's share or from what is held out."""
    while True:
        operation = random.choices(("add", "sub", "mul"), (37, 38, 25))[0]
        if operation == "mul":
            a, b = random.randint(0, 12), random.randint(0, 12)
        else:
            a, b = (random.randrange(10 ** random.choices((1, 2, 3), (2, 4, 8))[0]) for _ in range(2))
        if operation == "sub" and a < b and random.random() >= negative:
            a, b = b, a
        problem, way = Problem(operation, a, b), random.randrange(len(WAYS[operation]))
        if is_held_out(problem, way) == held_out:
            return problem, way


def is_correct(problem: Problem, reply: str) -> bool:
    """Whether the last number of a reply is the result."""
    return last_number(reply) == problem.result


def _digits(number: int, places: int) -> list[int]:
    return [number // 10**i % 10 for i in range(places)]


def _add(a: int, b: int) -> str:
    places, carry, steps = len(str(max(a, b))), 0, []
    for place, x, y in zip(PLACES, _digits(a, places), _digits(b, places), strict=False):
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        steps.append(f"{place}: {x} + {y}{carried} = {total}, write {total % 10}{', carry 1' if carry else ''}.")
    steps += [f"{PLACES[places]}: write 1."] * carry
    return f"{' '.join(steps)} So {a} + {b} = {a + b}."


def _subtract(a: int, b: int) -> str:
    if a < b:
        return f"{a} is less than {b}, so turn it around. {_subtract(b, a)[:-1]}, and {a} - {b} = {a - b}."
    places, borrowed, steps = len(str(a)), False, []
    for place, x, y in zip(PLACES, _digits(a, places), _digits(b, places), strict=False):
        lent, rest = " - 1" if borrowed else "", x - y - borrowed
        borrowed = rest < 0
        ten, said = (" + 10", ", borrow 1") if borrowed else ("", "")
        steps.append(f"{place}: {x}{ten}{lent} - {y} = {rest % 10}, write {rest % 10}{said}.")
    return f"{' '.join(steps)} So {a} - {b} = {a - b}."


def _multiply(a: int, b: int) -> str:
    return f"{a} times {b} is {a * b}."
