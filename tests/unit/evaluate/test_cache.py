import signal
import subprocess
import sys

import pytest
import torch

from cabochon.base.errors import MissingResource
from cabochon.evaluate.cache import model_key, open_store, request_key
from cabochon.lm import LM
from support import SMALL, small_model


def test_values_are_there_the_next_time(tmp_path):
    with open_store(tmp_path, "model") as store:
        assert store.get("a") is None
        store.put("a", [1.5, True])
        assert store.get("a") == [1.5, True]
    with open_store(tmp_path, "model") as store:
        assert store.get("a") == [1.5, True]
        assert store.reused == 1
    with open_store(tmp_path, "another") as store:
        assert store.get("a") is None


def test_values_stay_when_the_work_fails(tmp_path):
    with pytest.raises(RuntimeError), open_store(tmp_path, "model") as store:
        store.put("a", "text")
        raise RuntimeError
    with open_store(tmp_path, "model") as store:
        assert store.get("a") == "text"


@pytest.mark.parametrize("end", [b'["b", [1', b"\xff\xfe\n", b"3\n", b"{}\n", b'["only"]\n'])
def test_a_damaged_end_costs_only_itself(tmp_path, end):
    with open_store(tmp_path, "model") as store:
        store.put("a", 1)
    with (tmp_path / "model.jsonl").open("ab") as file:
        file.write(end)
    with open_store(tmp_path, "model") as store:
        assert store.get("a") == 1
        store.put("c", 2)
    with open_store(tmp_path, "model") as store:
        assert (store.get("a"), store.get("b"), store.get("c")) == (1, None, 2)


def test_a_killed_process_leaves_what_is_older_than_a_moment(tmp_path):
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom cabochon.evaluate import cache\n"
        "cache.INTERVAL = 0\nwith cache.open_store(Path(sys.argv[1]), 'model') as store:\n"
        "    for n in range(50):\n        store.put(str(n), n)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with open_store(tmp_path, "model") as store:
        assert [store.get(str(n)) for n in range(50)] == list(range(50))


def test_a_full_disk_ends_the_keeping_and_not_the_evaluation(tmp_path):
    (tmp_path / "model.jsonl").symlink_to("/dev/full")
    with open_store(tmp_path, "model") as store:
        store.put("a", 1)
        store.flush()
        assert store.trouble == "No space left on device"
        store.put("b", 2)
        assert (store.get("a"), store.get("b")) == (1, 2)


def test_without_a_folder_nothing_is_kept():
    with open_store(None, "model") as store:
        store.put("a", 1)
    with open_store(None, "model") as store:
        assert store.get("a") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingResource, match="cannot be used"), open_store(tmp_path / "file", "model"):
        pass


def test_keys_tell_requests_apart():
    keys = {request_key("score", ids, start) for ids in ([1, 2, 3], [1, 2], [12, 3]) for start in (1, 2)}
    assert len(keys) == 6
    assert request_key("score", [1], 1) == request_key("score", [1], 1)


def test_a_model_is_its_values_and_its_configuration():
    import dataclasses

    first, same = (model_key(LM(small_model(seed=1))) for _ in range(2))
    assert first == same
    other = LM(small_model(seed=1))
    other.model.layers[1].mlp.up.weight.data[3, 4] += 1e-3
    assert model_key(other) != first
    for changes in ({"sliding_window": 6}, {"attn_softcap": None}):
        assert model_key(LM(small_model(dataclasses.replace(SMALL, **changes), seed=1))) != first
    assert model_key(LM(small_model(seed=1).to(torch.bfloat16))) != first
