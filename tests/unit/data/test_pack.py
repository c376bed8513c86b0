"""Packing loses nothing, mixes nothing and learns only what it should."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cabochon.data.pack import IGNORED, Batch, Example, pack

EXAMPLES = st.lists(
    st.integers(2, 25).flatmap(
        lambda n: st.builds(
            Example,
            st.lists(st.integers(1, 99), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=12,
)


def documents(batches: list[Batch]) -> list[list[tuple[int, int]]]:
    """(input, target) pairs of every stretch of one document number, in order."""
    found: list[list[tuple[int, int]]] = []
    for batch in batches:
        for ids, targets, numbers in zip(batch.ids, batch.targets, batch.documents, strict=True):
            for number in numbers.unique_consecutive():
                here = numbers == number
                found.append(list(zip(ids[here].tolist(), targets[here].tolist(), strict=True)))
    return found


def expected(example: Example) -> list[tuple[int, int]]:
    return [
        (i, following if learned else IGNORED)
        for i, following, learned in zip(example.ids, example.ids[1:], example.learned[1:], strict=False)
    ]


def filler(count: int) -> list[Example]:
    """Enough of one id to push everything before it out of the packer."""
    return [Example([100] * 40, [True] * 40)] * count


@given(EXAMPLES, st.integers(1, 3), st.integers(3, 12))
def test_running_text_goes_on_in_the_next_row(examples: list[Example], rows: int, length: int) -> None:
    batches = list(pack(examples + filler(4), rows, length, split=True))
    assert all(batch.ids.shape == (rows, length) for batch in batches)
    seen = [pair for document in documents(batches) for pair in document if pair[0] != 100]
    wanted = [pair for example in examples for pair in expected(example)]
    assert seen == wanted[: len(seen)] and len(wanted) - len(seen) < 1 + rows * length


@given(EXAMPLES, st.integers(1, 3), st.integers(3, 30))
def test_a_conversation_is_whole_or_cut_at_the_end(examples: list[Example], rows: int, length: int) -> None:
    batches = list(pack(examples + filler(4 * rows), rows, length, split=False))
    seen = [d for d in documents(batches) if d[0][0] not in (0, 100)]
    wanted = [expected(example)[:length] for example in examples]
    assert seen == wanted[: len(seen)]
    if length >= 25:
        assert len(seen) == len(wanted)


def test_targets_are_counted() -> None:
    batch = Batch(torch.zeros(1, 3), torch.tensor([[4, IGNORED, 5]]), torch.zeros(1, 3))
    assert batch.num_targets == 2
