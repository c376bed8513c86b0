"""The chat's state machine: commands, overflow, regeneration."""

from pathlib import Path

import pytest
from fakes import FakeLM

from cabochon.base.errors import BadInput, CabochonError, UsageError
from cabochon.cli.repl import REGENERATION_TEMPERATURE, Ask, ChatSession, Leave, Say

SAMPLING = {"max_new_tokens": 512, "temperature": 0.0, "seed": None}


def session(context: int = 100, **settings: object) -> ChatSession:
    return ChatSession(FakeLM(context_length=context), {**SAMPLING, **settings})


def ask(chat: ChatSession, line: str, answer: str = "ok") -> Ask:
    step = chat.step(line)
    assert isinstance(step, Ask)
    chat.record(answer)
    return step


def test_a_conversation_grows_by_whole_turns() -> None:
    chat = session()
    ask(chat, "  one ", " first\n")
    step = ask(chat, "two")
    assert step.messages == [
        {"role": "user", "content": "one"},
        {"role": "model", "content": "first"},
        {"role": "user", "content": "two"},
    ]
    assert chat.turns == [("one", "first"), ("two", "ok")]


def test_an_answer_without_text_leaves_no_trace() -> None:
    chat = session()
    ask(chat, "one")
    ask(chat, "two", " ")
    assert chat.turns == [("one", "ok")]
    assert chat.pending is None


def test_system_prompt_leads_the_first_turn_and_is_kept_out_of_the_turns() -> None:
    chat = session()
    assert chat.step("/system Be brief.") == Say("System prompt set.")
    ask(chat, "one")
    step = ask(chat, "two")
    assert "Be brief." in step.messages[0]["content"]
    assert "Be brief." not in step.messages[2]["content"]
    assert chat.turns[0] == ("one", "ok")
    assert "Be brief." in chat.step("/system").text
    chat.step("/system -")
    assert "Be brief." not in ask(chat, "three").messages[0]["content"]


def test_overflow_drops_the_oldest_turns_and_says_so() -> None:
    chat = session(context=20)  # a quarter, 5 tokens, is kept for the answer
    for n in range(4):
        assert ask(chat, f"question {n}", f"answer {n}").notice is None
    step = ask(chat, "a b c")
    assert step.messages[0]["content"] == "question 1"
    assert step.notice == "The context is full: the oldest 1 turn left the conversation."
    assert chat.turns[0] == ("question 1", "answer 1")
    assert step.sampling["max_new_tokens"] == 20 - 15


def test_a_long_message_drops_everything_before_it() -> None:
    chat = session(context=20)
    ask(chat, "one")
    step = ask(chat, "word " * 18)
    assert len(step.messages) == 1
    assert step.sampling["max_new_tokens"] == 2


def test_a_message_longer_than_the_context_changes_nothing() -> None:
    chat = session(context=20)
    ask(chat, "one")
    with pytest.raises(BadInput, match="context holds 20"):
        chat.step("word " * 20)
    assert chat.turns == [("one", "ok")]
    assert chat.pending is None


def test_system_prompt_counts_towards_the_context() -> None:
    chat = session(context=20)
    chat.step("/system " + "rule " * 10)
    ask(chat, "one two three", "four five")
    assert ask(chat, "six seven").notice is not None


def test_regenerate_asks_again_with_another_draw() -> None:
    chat = session(seed=5)
    ask(chat, "one")
    first, second = ask(chat, "/regenerate", "better"), ask(chat, "/regenerate", "best")
    assert first.messages == [{"role": "user", "content": "one"}]
    assert first.sampling["temperature"] == REGENERATION_TEMPERATURE
    assert (first.sampling["seed"], second.sampling["seed"]) == (6, 7)
    assert chat.turns == [("one", "best")]


def test_regenerate_keeps_a_chosen_temperature() -> None:
    chat = session(temperature=1.3)
    ask(chat, "one")
    assert ask(chat, "/regenerate").sampling["temperature"] == 1.3


def test_a_regeneration_without_text_keeps_the_old_answer() -> None:
    chat = session()
    ask(chat, "one", "old")
    ask(chat, "/regenerate", "")
    assert chat.turns == [("one", "old")]


def test_regenerate_before_any_answer() -> None:
    assert session().step("/regenerate") == Say("There is no answer yet.")


def test_reset_forgets_the_conversation_and_keeps_the_system_prompt() -> None:
    chat = session()
    chat.step("/system Be brief.")
    ask(chat, "one")
    chat.step("/reset")
    assert chat.turns == []
    assert chat.system == "Be brief."


def test_save_and_load(tmp_path: Path) -> None:
    chat, other = session(), session()
    chat.step("/system Sag es auf Französisch.")
    ask(chat, "naïve\nquestion", "réponse 🦜")
    chat.step(f"/save {tmp_path / 'my chat.json'}")
    ask(other, "gone")
    assert other.step(f"/load {tmp_path / 'my chat.json'}") == Say("Loaded 1 turn.")
    assert (other.turns, other.system) == (chat.turns, chat.system)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    chat = session()
    ask(chat, "one")
    with pytest.raises(CabochonError):
        chat.step(f"/load {tmp_path / 'missing.json'}")
    assert chat.turns == [("one", "ok")]


@pytest.mark.parametrize("line", ["/save", "/load"])
def test_files_need_a_name(line: str) -> None:
    with pytest.raises(UsageError, match="needs a file"):
        session().step(line)


def test_help_names_every_command() -> None:
    text = session().step("/help").text
    for name in ("help", "reset", "system", "save", "load", "regenerate", "quit"):
        assert f"/{name}" in text


def test_quit() -> None:
    assert session().step("/quit") == Leave()


def test_a_misspelled_command_is_not_sent_to_the_model() -> None:
    with pytest.raises(UsageError, match="did you mean /reset"):
        session().step("/rest")


def test_a_space_makes_a_slash_text() -> None:
    assert ask(session(), " /usr/bin is what?").messages[-1]["content"] == "/usr/bin is what?"


def test_an_empty_line_asks_nothing() -> None:
    assert isinstance(session().step("  "), Say)
