"""Shards written in segments: whatever the blocks, threads and segments, the file is that of the tensors; and notes."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cabochon.base.files import Unfinished
from cabochon.merge import output
from cabochon.merge.output import opened
from cabochon.weights.names import to_hf

NAMES = ["embedding.weight", *(f"layers.0.mlp.{part}.weight" for part in ("gate", "up", "down")), "final_norm.weight"]


def plan(tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    jobs = [SimpleNamespace(name=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items()]
    return SimpleNamespace(jobs=jobs, dtype=dtype)


def made(sizes: list[int]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=draw) for name, size in zip(NAMES, sizes, strict=False)}


def folder(path: Path) -> Unfinished:
    work = Unfinished(path / "folder", path)
    work.folder.mkdir(exist_ok=True)
    return work


def blocks(tensor: Tensor, step: int) -> list[tuple[int, Tensor]]:
    return [(start, tensor[start : start + step]) for start in range(0, len(tensor), step)]


def written(work: Unfinished) -> dict[str, Tensor]:
    return {name: tensor for file in work.folder.iterdir() for name, tensor in load_file(file).items()}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=5),
    step=st.integers(1, 3000),
    segment=st.sampled_from([64, 4096, 8192, 1 << 20]),
    threads=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    shard=st.sampled_from([1, 9000, 1 << 30]),
)
def test_any_blocks_in_any_order_make_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int], step: int, segment: int, threads: int, dtype: torch.dtype, shard: int,
) -> None:  # fmt: skip
    tensors, work = made(sizes), folder(tmp_path_factory.mktemp("out"))
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(threads) as pool:
        patch.setattr(output, "SEGMENT", segment)
        patch.setattr(output, "COMMIT_BYTES", 5000)
        with opened(work, plan(tensors, dtype), shard) as out:
            for name, tensor in tensors.items():
                list(pool.map(out.sink(name), *zip(*reversed(blocks(tensor, step)), strict=True)))
                out.finished(name)
            out.commit()
    found = written(work)
    assert {to_hf(name) for name in tensors} == found.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[to_hf(name)], tensor.to(dtype))
    with opened(work, plan(tensors, dtype), shard) as out:
        assert out.done == tensors.keys()


@pytest.mark.parametrize("segment", [4096, 1 << 20])
def test_what_was_noted_stays_and_the_rest_is_written_around_it(
    segment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "SEGMENT", segment)
    tensors, work = made([3000, 500, 7, 2000, 12]), folder(tmp_path)
    described = plan(tensors, torch.float32)
    with pytest.raises(KeyboardInterrupt), opened(work, described, 1 << 30) as out:
        for name in NAMES[1::2]:
            out.sink(name)(0, tensors[name])
            out.finished(name)
        out.sink(NAMES[2])(0, tensors[NAMES[2]][:3])  # half of it
        raise KeyboardInterrupt
    with opened(work, described, 1 << 30) as out:
        assert out.done == set(NAMES[1::2])
        for name in NAMES[0::2]:
            out.sink(name)(0, tensors[name])
            out.finished(name)
        out.commit()
    assert all(torch.equal(written(work)[to_hf(name)], tensor) for name, tensor in tensors.items())


def test_a_disk_that_wants_no_direct_writes_gets_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.pwrite, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data, offset)

    monkeypatch.setattr(output, "SEGMENT", 4096)
    monkeypatch.setattr(output.os, "pwrite", pwrite)
    tensors, work = made([5000, 3000]), folder(tmp_path)
    with opened(work, plan(tensors, torch.float32), 1 << 30) as out:
        for name, tensor in tensors.items():
            out.sink(name)(0, tensor)
            out.finished(name)
        out.commit()
    assert len(refused) <= 1  # after the first it is not tried again
    assert all(torch.equal(written(work)[to_hf(name)], tensor) for name, tensor in tensors.items())


def test_an_error_of_the_disk_comes_up_where_blocks_are_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "SEGMENT", 4096)
    tensors, work = made([500_000, 5]), folder(tmp_path)
    with pytest.raises(OSError, match="No space left"), opened(work, plan(tensors, torch.float32), 1 << 30) as out:
        monkeypatch.setattr(output.os, "pwrite", full)
        for block in blocks(tensors[NAMES[0]], 700):
            out.sink(NAMES[0])(*block)
    assert (tmp_path / "done").read_bytes() == b""
