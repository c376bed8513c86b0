import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.data.miniature.arithmetic import WAYS, Problem, draw, is_correct, is_held_out

OPERANDS = st.integers(0, 999)


def value(terms: str) -> int:
    """The sum of a row of signed numbers such as "5 + 10 - 1 - 8"."""
    return sum(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d+)", terms))


@given(st.sampled_from(("add", "sub")), OPERANDS, OPERANDS)
def test_every_equation_of_the_working_is_true(operation: str, a: int, b: int) -> None:
    equations = re.findall(r"([\d+\- ]+\d) = (-?\d+)", Problem(operation, a, b).working())
    assert equations
    for left, right in equations:
        assert value(left) == int(right), (left, right)


@given(st.sampled_from(("add", "sub")), OPERANDS, OPERANDS)
def test_written_digits_spell_the_result(operation: str, a: int, b: int) -> None:
    problem = Problem(operation, a, b)
    written = re.findall(r"write (\d)", problem.working())
    assert int("".join(reversed(written))) == abs(problem.result)


@given(st.sampled_from(("add", "sub", "mul")), OPERANDS, OPERANDS)
def test_only_a_reply_that_ends_in_the_result_is_correct(operation: str, a: int, b: int) -> None:
    problem = Problem(operation, a, b)
    assert is_correct(problem, problem.working())
    assert not is_correct(problem, f"So it is {problem.result + 1}.")
    assert not is_correct(problem, "I am too small to know that.")


def test_the_format_that_the_model_learns() -> None:
    assert Problem("add", 347, 586).working() == (
        "ones: 7 + 6 = 13, write 3, carry 1. tens: 4 + 8 + 1 = 13, write 3, carry 1. "
        "hundreds: 3 + 5 + 1 = 9, write 9. So 347 + 586 = 933."
    )
    assert Problem("add", 94, 9).working() == (
        "ones: 4 + 9 = 13, write 3, carry 1. tens: 9 + 0 + 1 = 10, write 0, carry 1. "
        "hundreds: write 1. So 94 + 9 = 103."
    )
    assert Problem("sub", 502, 17).working() == (
        "ones: 2 + 10 - 7 = 5, write 5, borrow 1. tens: 0 + 10 - 1 - 1 = 8, write 8, borrow 1. "
        "hundreds: 5 - 1 - 0 = 4, write 4. So 502 - 17 = 485."
    )
    assert Problem("sub", 5, 9).working() == (
        "5 is less than 9, so turn it around. ones: 9 - 5 = 4, write 4. So 9 - 5 = 4, and 5 - 9 = -4."
    )
    assert Problem("mul", 7, 8).working() == "7 times 8 is 56."


@pytest.mark.parametrize("operation", ["add", "sub"])
def test_about_one_problem_in_ten_is_held_out_in_every_way_of_asking(operation: str) -> None:
    problems = [Problem(operation, a, b) for a in range(0, 1000, 9) for b in range(0, 1000, 11)]
    held_out = [p for p in problems if is_held_out(p, 0)]
    assert 0.08 < len(held_out) / len(problems) < 0.12
    assert all(is_held_out(p, way) for p in held_out for way in range(len(WAYS[operation])))


@given(OPERANDS, OPERANDS)
def test_a_difference_and_its_reverse_are_held_out_together(a: int, b: int) -> None:
    assert is_held_out(Problem("sub", a, b), 0) == is_held_out(Problem("sub", b, a), 0)


def test_every_table_entry_is_learned_in_most_ways() -> None:
    for a in range(13):
        for b in range(13):
            ways = [is_held_out(Problem("mul", a, b), way) for way in range(len(WAYS["mul"]))]
            assert sum(ways) <= len(ways) / 2


def test_held_out_problems_cover_every_operation_and_length() -> None:
    source = random.Random(0)
    problems = [draw(source, held_out=True, negative=0)[0] for _ in range(2000)]
    assert {p.operation for p in problems} == {"add", "sub", "mul"}
    assert {(len(str(p.a)), len(str(p.b))) for p in problems if p.operation == "add"} == {
        (i, j) for i in (1, 2, 3) for j in (1, 2, 3)
    }
    assert all(p.result >= 0 for p in problems)
    assert all(max(p.a, p.b) <= 999 for p in problems)
