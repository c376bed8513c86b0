"""The hybrid cache: its size, its ring, its rows."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.model.cache import KVCache
from cabochon.model.config import Gemma2Config
from support import SMALL, random_ids, relative_error, small_model


@pytest.mark.parametrize(("preset", "mebibytes"), [("2b", 624), ("9b", 2016), ("27b", 2208)])
def test_bytes_at_full_context(preset: str, mebibytes: int) -> None:
    config = Gemma2Config.preset(preset)
    hybrid = KVCache(config, 1, 8192, dtype=torch.bfloat16, device="meta").nbytes
    all_global = config.num_layers * 2 * config.num_kv_heads * 8192 * config.head_dim * 2
    assert hybrid == mebibytes * 2**20
    assert hybrid == 0.75 * all_global


def test_local_layers_hold_no_more_than_the_window() -> None:
    cache = KVCache(SMALL, 1, 100, dtype=torch.float32)
    assert [k.shape[2] for k in cache._keys] == [5, 100, 5]


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 12), pieces=st.lists(st.integers(1, 15), min_size=1, max_size=8))
@torch.no_grad()
def test_any_split_gives_the_uncached_answer(window: int, pieces: list[int]) -> None:
    config = dataclasses.replace(SMALL, sliding_window=window)
    model, ids = small_model(config), random_ids(config, 2, sum(pieces))
    cache = KVCache(config, 2, sum(pieces), dtype=torch.float32)
    parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
    assert relative_error(torch.cat(parts, 1), model(ids)) < 1e-5


@torch.no_grad()
def test_select_drops_and_branches_rows() -> None:
    model, ids = small_model(), random_ids(SMALL, 3, 12)
    cache = KVCache(SMALL, 3, 13, dtype=torch.float32)
    model(ids, cache=cache)
    cache.select([2, 0, 0])
    new = random_ids(SMALL, 3, 1, seed=5)
    whole = model(torch.cat([ids[[2, 0, 0]], new], 1))[:, -1:]
    assert relative_error(model(new, cache=cache), whole) < 1e-5


def test_more_positions_than_room_is_an_error() -> None:
    cache = KVCache(SMALL, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="exceed"):
        cache.extend(torch.arange(5)[None])
