import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trials import normal, patient, seeds

from cabochon.merge.methods.blocks import Whole
from cabochon.merge.methods.ranks import Cut, cuts, find, magnitude_keys, signed_keys

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, 1e-42])  # many equal ones, and one too small to be normal
lists = st.lists(st.one_of(floats, few), min_size=1, max_size=60)


def whole(*streams: Tensor) -> Whole:
    return Whole(streams, block=8)


@patient
@given(values=lists)
def test_keys_sort_as_the_floats_do(values: list[float]) -> None:
    tensor = torch.tensor(values)
    for keys, floats in ((magnitude_keys(tensor), tensor.abs()), (signed_keys(tensor), tensor)):
        less = (floats.unsqueeze(1) < floats).numpy()
        assert np.array_equal((keys.unsqueeze(1) < keys).numpy(), less)


@patient
@given(values=lists, data=st.data())
def test_ranks_are_those_of_sorting(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values).view(-1, 1)
    rank = data.draw(st.integers(0, len(values) - 1))
    signed = data.draw(st.booleans())
    ordered = np.sort(tensor.numpy() if signed else tensor.abs().numpy(), axis=None)
    keys = signed_keys if signed else magnitude_keys
    found = find(whole(tensor), lambda b: [keys(b.tensors[0])], [[rank]], signed=signed)[0][0]
    assert found.value == ordered[rank]
    assert found.smaller == (ordered < ordered[rank]).sum()
    assert found.equal == (ordered == ordered[rank]).sum()


@patient
@given(seed=seeds)
def test_streams_are_counted_side_by_side(seed: int) -> None:
    a, b = normal(seed, (9, 5)), normal(seed + 1, (9, 5), 1e-3)
    found = find(whole(a, b), lambda block: [magnitude_keys(t) for t in block.tensors], [[3, 40, 3], [44]])
    for stream, (tensor, ranks) in enumerate(((a, [3, 40, 3]), (b, [44]))):
        ordered = tensor.abs().flatten().sort().values
        assert [f.value for f in found[stream]] == [ordered[r].item() for r in ranks]


@patient
@given(values=lists, data=st.data())
def test_a_cut_has_so_many_above_it_and_takes_the_earlier_of_equal_ones(
    values: list[float], data: st.DataObject
) -> None:
    tensor = torch.tensor(values).view(-1, 1)
    n = data.draw(st.integers(1, len(values)))
    cut = cuts(whole(tensor), lambda b: [magnitude_keys(b.tensors[0])], [[n]])[0][0]
    size, place = tensor.abs().flatten(), torch.arange(len(values))
    above = (size > cut.value) | ((size == cut.value) & (place <= cut.index))
    expected = torch.argsort(size, descending=True, stable=True)[:n].sort().values
    if cut.value:  # of zeros it makes no difference
        assert torch.equal(place[above], expected)
    else:
        assert not size[expected][~above[expected]].any()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cuts_among_equal_values(n: int) -> None:
    tensor = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert cuts(Whole((tensor,), block=1), lambda b: [magnitude_keys(b.tensors[0])], [[n]]) == [[Cut(1.0, n - 1)]]
