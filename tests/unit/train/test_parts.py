"""Tensors cut into boxes and put together again, by our reader and by that of torch.distributed.checkpoint."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cabochon.base.errors import BadInput
from cabochon.train.parts import Part, Parts, write_parts


def boxes(tensor: torch.Tensor, cuts: list[list[int]]) -> list[Part]:
    """The tensor in a grid of pieces."""
    edges = [sorted({0, size, *(cut % size for cut in each)}) for size, each in zip(tensor.shape, cuts, strict=True)]
    corners = itertools.product(*(itertools.pairwise(each) for each in edges))
    return [
        Part("a:b/c", [low for low, _ in corner], tensor[tuple(slice(*sides) for sides in corner)])
        for corner in corners
    ]


def written(folder: Path, parts: list[Part], files: int) -> list[Path]:
    """Each piece in a file of its own or together with others, and a number in the first one."""
    paths = [folder / f"{i}.safetensors" for i in range(max(files, len(parts)))]
    for path, part in itertools.zip_longest(paths, parts):
        write_parts(path, [part] if part else [])
    write_parts(folder / "number.safetensors", [Part("step", [], torch.tensor(3.5))])
    return [*paths, folder / "number.safetensors"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    cuts=st.lists(st.lists(st.integers(0, 6), max_size=2), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_pieces_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], cuts: list[list[int]], dtype: torch.dtype
) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    folder, tensor = tmp_path_factory.mktemp("parts"), torch.randn(shape).to(dtype)
    paths = written(folder, boxes(tensor, cuts[: len(shape)]), 2)
    ours, theirs, number = torch.empty_like(tensor), torch.empty_like(tensor), torch.zeros(())
    parts = Parts(paths)
    parts.fill("a:b/c", ours)
    parts.fill("step", number)
    assert torch.equal(ours, tensor)
    assert number == 3.5
    load({"a:b/c": theirs}, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(theirs, tensor)


def test_a_missing_piece_is_seen(tmp_path: Path) -> None:
    pieces = boxes(torch.randn(4, 6), [[2], [3]])
    parts = Parts(written(tmp_path, pieces[1:], 0))
    with pytest.raises(BadInput, match="have 18 of 24 values of a:b/c"):
        parts.fill("a:b/c", torch.empty(4, 6))
    with pytest.raises(BadInput, match="have 0 of 1 values of other"):
        parts.fill("other", torch.empty(1))
