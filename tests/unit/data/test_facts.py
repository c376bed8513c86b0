from collections import Counter

from cabochon.data.miniature import facts


def test_no_two_facts_share_a_question() -> None:
    asked = Counter(
        facts.fact(kind, pair, way).question for kind, pair in facts.FACTS for way in range(len(kind.questions))
    )
    assert [question for question, times in asked.items() if times > 1] == []


def test_every_answer_names_what_was_asked_for() -> None:
    for kind, pair in facts.FACTS:
        fact = facts.fact(kind, pair, 0)
        assert facts.is_correct(fact, fact.answer), fact
        assert not facts.is_correct(fact, "I am too small to know that.")


def test_every_table_row_has_two_sides() -> None:
    assert len(facts.FACTS) > 250
    assert all(x and y and "|" not in x + y for _, (x, y) in facts.FACTS)


def test_part_of_a_word_is_not_an_answer() -> None:
    snake = facts.Fact("How many legs does a snake have?", "A snake has no legs.", "snake", "no")
    assert not facts.is_correct(snake, "A snake has nothing like legs.")
    assert facts.is_correct(snake, "a snake has no legs")


def test_articles_fit_the_word_that_follows() -> None:
    kind = next(k for k in facts.KINDS if k.name == "young")
    fact = facts.fact(kind, ("owl", "owlet"), 1)
    assert fact.answer == "A young owl is called an owlet."
    assert facts.statements().count("An ant has six legs.") == 1


def test_every_fact_is_learned_in_some_way_and_some_ways_are_held_out() -> None:
    for kind, pair in facts.FACTS:
        ways = range(len(kind.questions))
        assert sum(not facts.is_held_out(kind, pair, way) for way in ways) >= 2, (kind.name, pair)
    total = sum(len(kind.questions) for kind, _ in facts.FACTS)
    assert 0.05 < len(facts.held_out()) / total < 0.2
