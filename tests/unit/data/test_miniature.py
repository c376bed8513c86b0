import hashlib
import itertools
import os
import subprocess
import sys

import pytest

from cabochon.data import miniature
from cabochon.data.miniature import arithmetic, jokes, source
from cabochon.text.chat import Message

Exchange = tuple[str, str]


@pytest.fixture(scope="module")
def chats() -> list[list[Message]]:
    return list(itertools.islice(miniature.conversations(17), 20_000))


@pytest.fixture(scope="module")
def exchanges(chats: list[list[Message]]) -> list[Exchange]:
    return [(q["content"], a["content"]) for chat in chats for q, a in zip(chat[::2], chat[1::2], strict=True)]


def test_turns_alternate_and_end_with_the_model(chats: list[list[Message]]) -> None:
    for chat in chats:
        assert [turn["role"] for turn in chat] == ["user", "model"] * (len(chat) // 2)
        assert all(turn["content"].strip() == turn["content"] != "" for turn in chat)


def test_no_held_out_question_reaches_training(exchanges: list[Exchange]) -> None:
    asked = {question for question, _ in exchanges}
    assert not asked & {fact.question for fact in miniature.held_out_facts()}
    problems = miniature.held_out_arithmetic(20_000)
    assert len({problem for problem, _ in problems}) > 8_000
    assert not asked & {problem.question(way) for problem, way in problems}


def test_no_held_out_sum_is_worked_out_in_training(exchanges: list[Exchange]) -> None:
    worked_out = {end for _, reply in exchanges for end in _conclusions(reply)}
    assert len(worked_out) > 5_000
    for problem, _ in miniature.held_out_arithmetic(20_000):
        if problem.operation != "mul":
            sign = {"add": "+", "sub": "-"}[problem.operation]
            assert f"{problem.a} {sign} {problem.b} = {problem.result}" not in worked_out


def _conclusions(reply: str) -> list[str]:
    """ "So 9 - 5 = 4, and 5 - 9 = -4." holds two."""
    return reply.rpartition("So ")[2].rstrip(".").split(", and ")


def test_no_held_out_name_is_repeated_in_training(exchanges: list[Exchange]) -> None:
    names = {reply.removesuffix(" who?").lower() for _, reply in exchanges if reply.endswith(" who?")}
    held_out = {
        turn.expected[0].removesuffix(" who?").lower()
        for turn in miniature.held_out_jokes(2_000)
        if turn.expected[0].endswith(" who?")
    }
    assert len(names) > 1_000
    assert len(held_out) > 1_000
    assert not names & held_out


def test_every_kind_has_its_share(exchanges: list[Exchange], chats: list[list[Message]]) -> None:
    sums = sum("So " in reply or " times " in reply for _, reply in exchanges) / len(exchanges)
    knocks = sum("knock" in chat[0]["content"].lower() for chat in chats) / len(chats)
    assert 0.28 < sums < 0.5
    assert 0.08 < knocks < 0.2
    assert any(chat[-1]["content"].endswith("who?") for chat in chats)  # jokes may be cut short at the end,
    assert all("who?" not in chat[i]["content"] or i + 2 < len(chat) or len(chat) == 4
               for chat in chats for i in range(1, len(chat), 2))  # but never in the middle of a talk  # fmt: skip


def test_the_seed_fixes_every_byte_whatever_the_hash_seed() -> None:
    command = (
        "import itertools; from cabochon.data import miniature as m;"
        "print(list(itertools.islice(m.conversations(5), 300)));"
        "print(list(itertools.islice(m.pretraining_documents(5), 300)))"
    )
    assert _digest_of(command, "1") == _digest_of(command, "2")
    first, other = (list(itertools.islice(miniature.conversations(seed), 10)) for seed in (5, 6))
    assert first != other


def _digest_of(command: str, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, check=True)
    return hashlib.sha256(done.stdout).hexdigest()


def test_running_text_leaves_out_the_texts_for_perplexity() -> None:
    held_out = miniature.held_out_texts()
    assert all(len(texts) > 10 for texts in held_out.values())
    marks = {text[:80] for texts in held_out.values() for text in texts if len(text) > 400}
    # Licences and stock phrases open many files: those openings say nothing about a leak.
    shared = {
        text[:80] for name, text in (source.code_files() | source.prose()).items() if not source.is_held_out(name)
    }
    marks -= shared
    assert len(marks) > 20
    openings = {document[:80] for document in itertools.islice(miniature.pretraining_documents(1), 5_000)}
    assert not openings & marks
    assert openings & shared


def test_running_text_mixes_code_prose_and_exercises() -> None:
    documents = list(itertools.islice(miniature.pretraining_documents(1), 1_000))
    exercises = sum(len(d) for d in documents if d.startswith(("Question: ", "- ")))
    code = sum(len(d) for d in documents if "def " in d or "import " in d)
    total = sum(map(len, documents))
    assert exercises / total > 0.2
    assert code / total > 0.2
    assert max(map(len, documents)) <= 3_000


def test_held_out_problems_are_answered_by_their_own_working() -> None:
    for problem, way in miniature.held_out_arithmetic(500, seed=3):
        assert arithmetic.is_held_out(problem, way)
        assert arithmetic.is_correct(problem, problem.working())
    assert miniature.held_out_arithmetic(5, seed=3) == miniature.held_out_arithmetic(9, seed=3)[:5]
    assert [t.messages for t in miniature.held_out_jokes(2)] == [t.messages for t in miniature.held_out_jokes(3)][:12]
    assert len({type(t) for t in miniature.held_out_jokes(1)} | {jokes.Knock}) == 1
