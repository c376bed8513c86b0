"""Batches of a stored teacher: what was written, in an order that ranks and restarts do not change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cabochon.base.errors import BadInput, MissingResource, UsageError
from cabochon.data.pack import IGNORED, Batch
from cabochon.data.teacher import TeacherBatch, open_teacher
from cabochon.data.teacher_index import read_index
from teachers import LENGTH, VOCAB, batch, facts, said, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six batches of three rows, one of which has nothing to learn: 17 rows in three shards."""
    path = tmp_path_factory.mktemp("teacher") / "t"
    write(path, facts())
    return path


def rows_of(batches: list[TeacherBatch]) -> list[tuple[Any, ...]]:
    """Every row as a value that can be compared."""
    fields = ("ids", "targets", "documents", "teacher_ids", "probabilities")
    return [
        tuple(getattr(one, name)[r].numpy().tobytes() for name in fields)
        for one in batches
        for r in range(len(one.ids))
    ]


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_what_was_written_is_read(tmp_path: Path, kind: str) -> None:
    known = facts(kind=kind)
    _, made = write(tmp_path / "t", known)
    with open_teacher(tmp_path / "t", rows=1, epochs=1, shuffle=False) as stream:
        found = list(stream)
    wanted = [(number, r) for number in range(6) for r in range(3) if (number, r) != (3, 1)]
    assert len(found) == len(wanted) == stream.batches == 17
    for one, (number, r) in zip(found, wanted, strict=True):
        source = made[number]
        for name in ("ids", "targets", "documents"):
            assert torch.equal(getattr(one, name)[0], getattr(source, name)[r])
        where = source.targets != IGNORED
        begin, end = int(where[:r].sum()), int(where[: r + 1].sum())
        spoken = said(source, known, seed=number)
        assert np.array_equal(one.teacher_ids[0][where[r]].numpy(), spoken.ids[begin:end])
        assert np.allclose(one.probabilities[0][where[r]].numpy(), spoken.probabilities[begin:end], rtol=1e-3)
        assert not one.probabilities[0][~where[r]].any() and (one.weights is None) == (kind == "top-k")


def test_an_epoch_has_each_row_once_and_epochs_differ(folder: Path) -> None:
    with open_teacher(folder, rows=1, epochs=2, seed=3) as stream:
        rows = rows_of(list(stream))
    first, second = rows[:17], rows[17:]
    assert len(set(first)) == 17 and set(first) == set(second) and first != second
    with open_teacher(folder, rows=1, epochs=1, seed=4) as stream:
        assert rows_of(list(stream)) != first


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_batches(folder: Path, world: int) -> None:
    with open_teacher(folder, rows=4, epochs=2) as stream:
        whole = list(stream)
    parts = []
    for rank in range(world):
        with open_teacher(folder, rows=4, epochs=2, rank=rank, world=world) as stream:
            parts.append(list(stream))
    assert len(whole) == 9 and all(len(part) == 9 for part in parts)
    for number, one in enumerate(whole):
        for rank in range(world):
            for name in ("ids", "targets", "documents", "teacher_ids", "probabilities"):
                assert torch.equal(getattr(parts[rank][number], name), getattr(one, name)[rank::world])


def test_the_last_batch_is_filled_up(folder: Path) -> None:
    with open_teacher(folder, rows=5, epochs=1) as stream:
        last = list(stream)[-1]
        empty = stream.empty()
    assert [(row != IGNORED).any().item() for row in last.targets] == [True, True, False, False, False]
    assert empty.num_targets == 0 and empty.teacher_ids.shape == (5, LENGTH, 5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(taken=st.integers(0, 11), prefetch=st.integers(0, 3), world=st.sampled_from([1, 2]))
def test_a_run_goes_on_with_the_next_row(folder: Path, taken: int, prefetch: int, world: int) -> None:
    with open_teacher(folder, rows=2, seed=5, prefetch=2) as stream:
        for _ in range(taken):
            next(stream)
        state = json.loads(json.dumps(stream.state()))
        wanted = [next(stream) for _ in range(12)]
    for rank in range(world):
        with open_teacher(folder, rows=2, seed=5, rank=rank, world=world, prefetch=prefetch) as again:
            next(again)  # what is ahead has to be forgotten
            again.restore(state)
            assert again.state() == state
            for one in wanted:
                assert torch.equal(next(again).ids, one.ids[rank::world])


def test_a_state_of_other_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", facts(k=4))
    with open_teacher(folder, rows=1, seed=1) as stream, open_teacher(tmp_path / "other", rows=1, seed=1) as other:
        with pytest.raises(UsageError, match="cannot go on"):
            other.restore(stream.state())
        with pytest.raises(UsageError, match="seed was 2"):
            stream.restore(stream.state() | {"seed": 2})


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_parts_of_a_batch_are_the_batch(folder: Path, rows: int) -> None:
    with open_teacher(folder, rows=5) as stream:
        one = next(stream)
    parts = list(one.split(rows))
    assert all(isinstance(part, TeacherBatch) for part in parts)
    assert rows_of(parts) == rows_of([one]) and sum(part.num_targets for part in parts) == one.num_targets
    assert isinstance(one, Batch)


@pytest.mark.parametrize("k", [1, 3, 64])
def test_any_number_of_entries_of_a_large_vocabulary(tmp_path: Path, k: int) -> None:
    known = facts(k=k, vocab_size=256_000, kind="sampled")
    index, made = write(tmp_path / "t", known, batches=2)
    with open_teacher(tmp_path / "t", rows=3, epochs=1, shuffle=False) as stream:
        one = next(stream)
    spoken = said(made[0], known, seed=0)
    where = made[0].targets != IGNORED
    assert np.array_equal(one.teacher_ids[where].numpy(), spoken.ids)
    assert one.weights is not None and torch.allclose(one.weights[where].sum(1), torch.ones(len(spoken.ids)))
    assert index.totals.tokens == sum(b.num_targets for b in made)


# What is wrong with a folder


def test_rows_that_ranks_cannot_share(folder: Path) -> None:
    for rows, world in ((3, 2), (0, 1)):
        with pytest.raises(UsageError, match=f"cannot have {rows} rows"):
            open_teacher(folder, rows=rows, world=world)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | values))


def resized(folder: Path) -> list[dict[str, Any]]:
    """The shards of an index, with the sizes that files have now."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    return [shard | {"nbytes": (folder / shard["file"]).stat().st_size} for shard in shards]


def read_all(folder: Path) -> None:
    with open_teacher(folder, rows=1, epochs=1) as stream:
        for _ in stream:
            pass


SHARD = "rows-00001.safetensors"
DAMAGE = {
    "no index": (lambda f: (f / "index.json").unlink(), MissingResource, "no stored teacher"),
    "no folder": (lambda f: [file.unlink() for file in f.iterdir()], MissingResource, "no stored teacher"),
    "index is no JSON": (lambda f: (f / "index.json").write_text("{"), BadInput, "not a whole index"),
    "index is a list": (lambda f: (f / "index.json").write_text("[]"), BadInput, "not a whole index"),
    "index without k": (lambda f: change(f / "index.json", k=None), BadInput, "not a whole index"),
    "index with a path": (
        lambda f: change(f / "index.json", shards=[dict(file="../x", rows=17, tokens=1, nbytes=1, sha256="")]),
        BadInput, "not a whole index",
    ),
    "newer format": (lambda f: change(f / "index.json", format=2), BadInput, "format 2"),
    "fewer ids": (lambda f: change(f / "index.json", vocab_size=100), BadInput, "100 ids"),
    "another k": (lambda f: change(f / "index.json", k=4), BadInput, "tensors are not those"),
    "shard gone": (lambda f: (f / SHARD).unlink(), MissingResource, SHARD),
    "shard cut": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]), BadInput, "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    harm, kind, message = DAMAGE[name]
    target = copied(folder, tmp_path / "t")
    harm(target)
    with pytest.raises(kind, match=message) as caught:
        read_all(target)
    assert str(caught.value).count("\n") == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_shard_is_seen(folder: Path, tmp_path_factory: Any, place: float, bit: int) -> None:
    target = copied(folder, tmp_path_factory.mktemp("flipped") / "t")
    data = bytearray((target / SHARD).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (target / SHARD).write_bytes(data)
    with pytest.raises(BadInput, match=SHARD):
        read_all(target)


@pytest.mark.parametrize("name", ["low", "starts", "checks"])
def test_tensors_of_another_type_or_length_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    target = copied(folder, tmp_path / "t")
    tensors = load_file(target / SHARD)
    changed = tensors["low"].view(np.int16) if name == "low" else np.append(tensors[name], tensors[name][:1])
    save_file(tensors | {name: changed}, target / SHARD)
    change(target / "index.json", shards=resized(target))
    with pytest.raises(BadInput, match="tensors are not those"):
        read_all(target)


def test_the_index_tells_what_a_token_takes(folder: Path) -> None:
    index = read_index(folder)
    means = index.per_token()
    assert means["bytes"] == sum(shard.nbytes for shard in index.shards) / index.totals.tokens
    assert means["kl_lost"] == pytest.approx(0.1 * sum(range(6)) / index.totals.tokens)
    assert index.totals.rows == 17 and index.facts.vocab_size == VOCAB
    assert [shard.rows for shard in index.shards] == [6, 5, 6] == [s.rows for s in index.shards]
    assert batch(3).targets[1].eq(IGNORED).all()
