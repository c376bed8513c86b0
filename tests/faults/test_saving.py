"""A disk that fills up and a process that is killed leave nothing that could be taken for a model."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cabochon.base.errors import MissingResource
from cabochon.weights import save as save_module
from cabochon.weights.folder import load_model, save_model
from support import SMALL, small_model

# Writes one piece of the first tensor, says so, and waits to be killed.
HANG = """
import sys, time
from pathlib import Path
import torch
from cabochon.model.config import Gemma2Config
from cabochon.weights.names import shapes, to_hf
from cabochon.weights.save import Entry, write_folder

config = Gemma2Config.preset("tiny")

def pieces():
    yield torch.zeros(1000)
    print("writing", flush=True)
    time.sleep(600)

entries = [Entry(to_hf(name), shape, pieces) for name, shape in shapes(config)]
write_folder(Path(sys.argv[1]), config, entries, dtype=torch.float32, overwrite=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A disk of its own that holds less than the model."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def file_limit(count: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with full_disk(disk):
        with pytest.raises(MissingResource, match="No space left") as caught:
            save_model(small_model(SMALL), disk / "m")
        assert str(caught.value).count("\n") == 2
        assert names(disk) == []


@pytest.mark.parametrize("limit", [0, 100, 10_000, 4 * SMALL.num_parameters])
def test_a_file_that_cannot_grow_leaves_the_old_model(tmp_path: Path, limit: int) -> None:
    target = tmp_path / "m"
    old = small_model(SMALL, seed=1)
    save_model(old, target)
    with file_limit(limit), pytest.raises(MissingResource):
        save_model(small_model(SMALL, seed=2), target, overwrite=True)
    assert names(tmp_path) == ["m"]
    assert torch.equal(load_model(target).embedding.weight, old.embedding.weight)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingResource, match="was not written"):
        save_model(small_model(SMALL), tmp_path / "file" / "m")


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_process_leaves_the_old_state_and_the_next_one_cleans_up(tmp_path: Path, existing: bool) -> None:
    target, model = tmp_path / "m", small_model(SMALL)
    if existing:
        save_model(model, target)
    env = {**os.environ, "PYTHONPATH": str(Path(save_module.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", HANG, str(target)], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    left = [name for name in names(tmp_path) if name != "m"]
    assert len(left) == 1
    assert left[0].startswith(".m.")
    assert target.exists() == existing
    if existing:
        assert torch.equal(load_model(target).embedding.weight, model.embedding.weight)
    save_model(model, target, overwrite=existing)
    assert names(tmp_path) == ["m"]
    assert torch.equal(load_model(target).embedding.weight, model.embedding.weight)
