"""Adapters of a merge that lie on the Hub: fetched once, by name and revision, and put on their model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub, serve
from safetensors.torch import save_file

from cabochon.weights.folder import load_model
from cabochon.weights.init import init_folder
from support import SMALL

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A model and an adapter for it."""
    init_folder(SMALL, tmp_path / "base", dtype=torch.float32, tokenizer=False)
    (tmp_path / "lora").mkdir()
    rows, columns = SMALL.num_heads * SMALL.head_dim, SMALL.hidden_size
    torch.manual_seed(0)
    parts = {"lora_A": torch.randn(2, columns), "lora_B": torch.randn(rows, 2)}
    tensors = {f"base_model.model.{Q}.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [Q]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def hub(work: Path) -> Iterator[FakeHub]:
    with serve(FakeHub({file.name: file.read_bytes() for file in (work / "lora").iterdir()})) as running:
        yield running


def merged(work: Path, hub: FakeHub, adapter: str, out: str, *flags: str) -> subprocess.CompletedProcess[str]:
    text = f"models: [{{model: {work}/base+{adapter}}}]\nmerge_method: passthrough\n"
    (work / "merge.yml").write_text(text)
    # The client reads its settings when it is imported, so every call gets a process of its own.
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
    environment |= {"HF_HOME": str(work / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "cabochon", "merge", work / "merge.yml", work / out, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_an_adapter_is_fetched_and_put_on_its_model(work: Path, hub: FakeHub) -> None:
    for number, name in enumerate(("owner/model", f"owner/model@{COMMIT}", f"{work}/lora")):
        done = merged(work, hub, name, f"out{number}")
        assert done.returncode == 0, done.stderr
    assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors"]  # once
    weights = [load_model(work / f"out{i}").get_parameter("layers.1.attention.q.weight") for i in range(3)]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], load_model(work / "base").get_parameter("layers.1.attention.q.weight"))
    hub.requests.clear()
    assert merged(work, hub, "owner/model", "again", "--offline").returncode == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    ("adapter", "code", "said"),
    [
        ("owner/modle", 4, "the Hub has no such model"),
        ("owner/model@nothing", 4, "no revision 'nothing'"),
        ("lora", 4, "no adapter in lora"),
    ],
)
def test_adapters_that_are_not_there(work: Path, hub: FakeHub, adapter: str, code: int, said: str) -> None:
    done = merged(work, hub, adapter, "out")
    assert (done.returncode, said in done.stderr, (work / "out").exists()) == (code, True, False), done.stderr
    assert "Traceback" not in done.stderr


def test_pickled_adapters_are_not_fetched(work: Path, hub: FakeHub) -> None:
    hub.files["adapter_model.bin"] = hub.files.pop("adapter_model.safetensors")
    done = merged(work, hub, "owner/model", "out")
    assert done.returncode == 3 and "pickled" in done.stderr, done.stderr
    assert hub.fetched() == ["adapter_config.json"]
