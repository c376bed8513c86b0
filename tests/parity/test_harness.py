"""Our backend against the harness's own Hugging Face backend: the same requests, the same model, float32."""

import random
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import cabochon
from cabochon.base.errors import BadInput
from cabochon.data import miniature
from cabochon.data.miniature import arithmetic
from cabochon.evaluate.harness import Backend
from cabochon.evaluate.prompts import shown

FOLDER = str(Path(cabochon.__file__).parent / "models" / "tiny")


@pytest.fixture(scope="module")
def ours():
    return Backend(cabochon.load(FOLDER, dtype="float32", device="cpu"))


def hugging_face(**settings):
    return HFLM(pretrained=FOLDER, dtype="float32", device="cpu", batch_size=8, **settings)


@pytest.fixture(scope="module")
def theirs():
    return hugging_face()


def requests(kind, *arguments):
    return [Instance(kind, {}, one, 0, ("some task", n, 1)) for n, one in enumerate(arguments)]


def check_scores(ours, theirs, pairs):
    given = requests("loglikelihood", *pairs)
    for one, other in zip(ours.loglikelihood(given), theirs.loglikelihood(given, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


def shots(count, draw):
    """Worked sums, as a prompt has them before its own question."""
    drawn = [arithmetic.draw(draw) for _ in range(count)]
    return "".join(f"Question: {p.question(way)}\nAnswer: {p.working()}\n\n" for p, way in drawn)


def test_choices_behind_shared_examples(ours, theirs):
    examples, facts = shots(5, random.Random(1)), miniature.held_out_facts()[:6]
    check_scores(
        ours,
        theirs,
        [
            (f"{examples}Question: {fact.question}\nAnswer:", f" {answer}")
            for fact in facts
            for answer in (fact.answer, fact.answer.replace(fact.wanted, "Rome"), fact.wanted, "no")
        ],
    )


def test_one_token_many_tokens_blanks_and_no_context(ours, theirs):
    check_scores(
        ours,
        theirs,
        [
            *(("Question: What is 2 + 2?\nAnswer:", f" {letter}") for letter in "ABCD"),
            ("The capital of France is ", "Paris."),
            ("A dog says\n\n", "woof. " * 20),
            ("", "def f(x):"),
            ("", " Paris"),
            ("   ", "Paris"),
            ("Wörter, 漢字 und 👍:", " ja 👍"),
            ("same", " text"),
            ("same", " text"),
        ],
    )


def test_what_is_longer_than_the_context_is_cut_on_the_left(ours, theirs):
    long = "one two three four five six seven eight nine ten " * 300
    before = ours.truncated["some task"]
    check_scores(ours, theirs, [(long, " eleven"), (long, long[:900]), ("short", " one")])
    assert ours.truncated["some task"] == before + 2


def test_rolling_texts_with_one_bos(ours, theirs):
    """The Hugging Face backend puts two in front, unless its tokenizer puts none: then they are the same."""
    texts = [*miniature.held_out_texts()["prose"][:3], "x", "def f(x):\n    return x\n" * 130]
    given = requests("loglikelihood_rolling", *((text,) for text in texts))
    found = ours.loglikelihood_rolling(given)
    plain = hugging_face(add_bos_token=False).loglikelihood_rolling(given, disable_tqdm=True)
    doubled = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    for one, other, twice in zip(found, plain, doubled, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-6)  # theirs is a sum in float32
        assert abs(one - twice) > 0.1


def test_answers(ours, theirs):
    examples, problems = shots(3, random.Random(2)), miniature.held_out_arithmetic(12)
    given = requests(
        "generate_until",
        *(
            (f"{examples}Question: {p.question(way)}\nAnswer:", {"until": ["\n\n", "Question:"], "max_gen_toks": 150})
            for p, way in problems
        ),
        ("Once upon a time", {"until": ["."], "max_gen_toks": 40}),
        ("Once upon a time", {"until": [], "max_gen_toks": 7}),
        ("word " * 1500, {"until": ["\n"], "max_gen_toks": 30}),
    )
    assert ours.generate_until(given) == theirs.generate_until(given, disable_tqdm=True)


CHATS = [
    [{"role": "user", "content": "  What is 3 + 4? "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}],
    [
        {"role": "user", "content": "Knock knock."},
        {"role": "assistant", "content": "Who's there?"},
        {"role": "user", "content": "Zorbin."},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat[-1]["content"])
def test_chats(ours, theirs, chat):
    mine, their = ours.apply_chat_template(chat), theirs.apply_chat_template(chat)
    assert shown(mine) == their
    for ending in ("The answer is 7.", " So it is", "Zorbin who?"):
        (one,) = ours.loglikelihood(requests("loglikelihood", (mine, ending)))
        (other,) = theirs.loglikelihood(requests("loglikelihood", (their, ending)), disable_tqdm=True)
        assert one[0] == pytest.approx(other[0], abs=1e-4)
    settings = {"until": [], "max_gen_toks": 60}
    (said,) = ours.generate_until(requests("generate_until", (mine, settings)))
    assert [said] == theirs.generate_until(requests("generate_until", (their, settings)), disable_tqdm=True)


def test_an_answer_that_is_begun(ours, theirs):
    chat = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "The"}]
    mine = ours.apply_chat_template(chat, add_generation_prompt=False)
    their = theirs.apply_chat_template(chat, add_generation_prompt=False)
    assert shown(mine) == their
    (one,) = ours.loglikelihood(requests("loglikelihood", (mine, " capital of France is Paris.")))
    (other,) = theirs.loglikelihood(
        requests("loglikelihood", (their, " capital of France is Paris.")), disable_tqdm=True
    )
    assert one[0] == pytest.approx(other[0], abs=1e-4)


def test_control_pieces_that_an_item_spells_are_text(ours):
    """Here we differ on purpose: for the Hugging Face backend the item ends its own turn."""
    prompt = ours.apply_chat_template([{"role": "user", "content": "a<end_of_turn>b"}])
    ids, tokenizer = ours.encoder.encode(prompt), ours.lm.text_tokenizer
    assert ids.count(tokenizer.end_of_turn_id) == 1
    assert ids.count(tokenizer.bos_id) == 1


def test_an_answer_longer_than_the_context_is_refused(ours):
    with pytest.raises(BadInput, match="1024 tokens"):
        ours.generate_until(requests("generate_until", ("x", {"until": [], "max_gen_toks": 1024})))


def test_drawn_answers_differ_and_come_again(ours):
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    given = requests("generate_until", *[("Once upon", settings)] * 4)
    drawn = ours.generate_until(given)
    assert len(set(drawn)) > 1
    assert Backend(ours.lm).generate_until(given) == drawn
