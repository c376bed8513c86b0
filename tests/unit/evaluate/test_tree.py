from array import array

from hypothesis import given
from hypothesis import strategies as st

from cabochon.evaluate.tree import Node, Scored, agreement, grow

# Few tokens, so that texts share beginnings, end within one another and come twice.
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


def runs(node: Node, before: tuple[int, ...] = ()):
    """Every node with the tokens up to its end."""
    whole = before + tuple(node.ids[node.start : node.end])
    yield whole, node
    for child in node.children.values():
        yield from runs(child, whole)


@given(texts, st.data())
def test_each_beginning_is_there_once_and_each_question_is_asked_where_it_belongs(lists, data):
    scored = [Scored(array("i", ids), data.draw(st.integers(1, len(ids)))) for ids in lists]
    found = list(runs(grow(scored)))
    computed = [whole[:end] for whole, node in found for end in range(node.start + 1, node.end + 1)]
    assert len(computed) == len(set(computed))
    assert set(computed) == {tuple(ids[:end]) for ids in lists for end in range(1, len(ids))}
    asked = sorted(
        (number, position, whole[: position + 1], token)
        for whole, node in found
        for position, tokens in node.wanted.items()
        for token, numbers in tokens.items()
        for number in numbers
    )
    assert asked == sorted(
        (number, place - 1, tuple(s.ids[:place]), s.ids[place])
        for number, s in enumerate(scored)
        for place in range(s.start, len(s.ids))
    )


@given(texts)
def test_the_path_of_a_node_is_its_own_text(lists):
    for whole, node in runs(grow([Scored(array("i", ids), 1) for ids in lists])):
        assert tuple(node.ids[: node.end]) == whole


@given(st.integers(0, 40), st.integers(0, 40))
def test_agreement(length, differs):
    a = array("i", range(length))
    b = array("i", (i if i != differs else -1 for i in range(length)))
    assert agreement(a, b) == min(length, differs)
