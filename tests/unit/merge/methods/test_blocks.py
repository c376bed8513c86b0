from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trials import PARAMETERS, model_count, normal, patient, random_run, seeds, shapes

from cabochon.base.errors import BadInput
from cabochon.merge.methods import METHODS
from cabochon.merge.methods.blocks import Block, Whole
from cabochon.merge.methods.method import bind, merge


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, shape=shapes, block=st.integers(1, 100), half=st.booleans())
def test_blocks_of_any_size_give_the_same_bits(
    method: str, seed: int, shape: tuple[int, ...], block: int, half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    assert torch.equal(random_run(method, seed, shape, dtype), random_run(method, seed, shape, dtype, block=block))


@pytest.mark.parametrize("method", METHODS)
def test_threads_give_the_same_bits(method: str) -> None:
    base = None if METHODS[method].base == "none" else normal(0, (300, 40))
    models = tuple(normal(1 + i, (300, 40)) for i in range(model_count(method)))
    bound = bind(METHODS[method], PARAMETERS[method], [{}] * len(models), seed=5)
    results = []
    with ThreadPoolExecutor(3) as pool:
        for run in (map, pool.map):
            results.append(torch.empty(300, 40))
            merge(METHODS[method], Whole(models, base, run=run, block=400), bound, results[-1])
    assert torch.equal(*results)


@patient
@given(shape=shapes, block=st.integers(1, 100))
def test_blocks_are_whole_rows_in_order(shape: tuple[int, ...], block: int) -> None:
    tensor = normal(0, shape)
    whole = Whole((tensor,), block=block)
    blocks = list(whole.map(lambda b: b))
    assert [b.start for b in blocks] == [sum(x.tensors[0].numel() for x in blocks[:i]) for i in range(len(blocks))]
    assert torch.equal(torch.cat([b.tensors[0] for b in blocks]).view(shape), tensor)
    assert all(b.tensors[0].shape[1:] == (shape[-1] if shape else 1,) for b in blocks)
    assert all(b.tensors[0].numel() <= max(block, whole.columns) for b in blocks)


def test_deltas_are_models_without_a_base() -> None:
    a, b = torch.ones(1, 2), torch.full((1, 2), 3.0)
    assert torch.equal(Block((b,), a, 0).deltas()[0], torch.full((1, 2), 2.0))
    assert Block((b,), None, 0).deltas() == [b]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match=r"\[2, 3\] and \[3, 2\]"):
        Whole((torch.ones(2, 3), torch.ones(3, 2)))
    with pytest.raises(BadInput, match="different shapes"):
        Whole((torch.ones(2),), torch.ones(3))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(BadInput, match=r"torch\.int64"):
        Whole((torch.ones(2), torch.ones(2).long()))


def test_types_may_differ() -> None:
    out = torch.empty(2)
    method = METHODS["linear"]
    merge(method, Whole((torch.ones(2).half(), torch.ones(2).bfloat16())), bind(method, {"weight": 1}, [{}, {}]), out)
    assert torch.equal(out, torch.ones(2))


def test_what_float16_cannot_hold_is_refused() -> None:
    method, bound = METHODS["linear"], bind(METHODS["linear"], {"weight": 1}, [{}])
    out = torch.empty(2, dtype=torch.float16)
    with pytest.raises(BadInput, match="70000, float16 ends at 65504"):
        merge(method, Whole((torch.tensor([1.0, 70000.0]),)), bound, out)


def test_a_sum_that_leaves_float32_is_refused() -> None:
    method, bound = METHODS["linear"], bind(METHODS["linear"], {"weight": 10, "normalize": False}, [{}])
    with pytest.raises(BadInput, match="leave float32"):
        merge(method, Whole((torch.tensor([1e38]),)), bound, torch.empty(1))
