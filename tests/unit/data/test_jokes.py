import random

from cabochon.data.miniature import jokes


def test_the_middle_turn_repeats_the_name_that_was_given() -> None:
    source = random.Random(1)
    for _ in range(500):
        turns = [turn["content"] for turn in jokes.from_user(source)]
        assert turns[1] == "Who's there?"
        name = turns[3].removesuffix(" who?")
        assert name[0].isupper()
        assert name.lower() in turns[2].lower()


def test_a_joke_that_the_model_tells_keeps_to_one_name() -> None:
    source, punch_lines = random.Random(1), dict(jokes.PUNCH_LINES)
    for _ in range(500):
        turns = [turn["content"] for turn in jokes.from_model(source)]
        assert turns[1] == "Knock knock."
        assert turns[5] == punch_lines[turns[3].removesuffix(".")]


def test_names_that_are_held_out_are_never_made_up_in_training() -> None:
    source = random.Random(2)
    training = {jokes.made_up_name(source).lower() for _ in range(20_000)}
    held_out = {jokes.made_up_name(source, held_out=True).lower() for _ in range(2_000)}
    assert not training & held_out
    assert not held_out & {name.lower() for name, _ in jokes.PUNCH_LINES}
    assert {len(name.split()) for name in held_out} == {1, 2}


def test_held_out_turns_accept_the_right_form_and_nothing_else() -> None:
    for turn in jokes.held_out(random.Random(3)):
        assert turn.messages[-1]["role"] == "user"
        assert all(jokes.is_correct(turn, reply) for reply in turn.expected)
        assert not jokes.is_correct(turn, "Who?")
        assert not jokes.is_correct(turn, "")


def test_there_are_many_punch_lines() -> None:
    assert len(dict(jokes.PUNCH_LINES)) == len(jokes.PUNCH_LINES) >= 38
