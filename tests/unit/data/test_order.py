"""Orders are permutations, the same everywhere, and are dealt fairly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.data import order
from cabochon.data.order import deal, held_out, shuffled

GROUPS = st.lists(st.integers(0, 40), min_size=1, max_size=30).map(lambda sizes: np.array(sizes, np.int64))


@given(GROUPS, st.integers(0, 99))
def test_an_order_has_every_row_once(groups: np.ndarray, seed: int) -> None:
    found = shuffled(groups, (seed, 0, 0))
    assert sorted(found.tolist()) == list(range(groups.sum()))
    assert found.tolist() == shuffled(groups, (seed, 0, 0)).tolist()


def test_an_order_is_the_same_in_every_version() -> None:
    assert shuffled(np.ones(8, np.int64), (7, 0, 1)).tolist() == [2, 7, 3, 5, 0, 6, 4, 1]


def test_rows_stay_near_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW", 50)
    found = shuffled(np.full(40, 10, np.int64), (0,))
    for at in range(0, 400, 50):
        assert len(set(found[at : at + 50] // 10)) == 5  # five whole groups
    assert (np.diff(found) == 1).mean() < 0.2


@given(st.lists(st.integers(1, 1000), max_size=200), st.integers(1, 9), st.data())
def test_lanes_get_nearly_the_same(sizes: list[int], lanes: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, lanes - 1))
    owners = deal(np.array(sizes, np.int64), lanes, first)
    loads = np.bincount(owners, weights=sizes, minlength=lanes) if sizes else np.zeros(lanes)
    assert loads.max() - loads.min() <= max(sizes, default=0)
    if sizes:
        assert owners[0] == first


def test_only_the_last_documents_are_dealt_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BALANCED", 20)
    sizes = np.arange(1, 101)
    owners = deal(sizes, 4, 1)
    assert owners[:80].tolist() == [(i + 1) % 4 for i in range(80)]
    loads = np.bincount(owners, weights=sizes)
    assert loads.max() - loads.min() <= 100


@given(st.integers(1, 500), st.floats(0.001, 0.999), st.integers(0, 9))
def test_a_share_is_held_out(count: int, share: float, seed: int) -> None:
    held = held_out(count, share, seed)
    assert len(set(held.tolist())) == len(held) == max(1, round(count * share))
    assert held.tolist() == sorted(held) and held[0] >= 0 and held[-1] < count
    assert len(held_out(count, 0, seed)) == 0
