"""The arithmetic of docs/scaling.md, worked out again, and the launch files in examples/, which parse and start."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import ROOT, table
from shell import environment

from cabochon.model.config import Gemma2Config
from cabochon.train.config import TrainConfig
from cabochon.weights.names import shapes

PAGE, EXAMPLES = ROOT / "docs" / "scaling.md", ROOT / "examples"
SIZES = "2b", "9b", "27b"
TOKENS = 8192


@dataclass(frozen=True)
class Arithmetic:
    """Weights of a model, all of them, of its embedding, of one layer and of all matrices inside layers."""

    config: Gemma2Config

    @property
    def embedding(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layer(self) -> int:
        return sum(self._numbers("layers.0."))

    @property
    def matrices(self) -> int:
        return sum(n for n in self._numbers("layers.") if n > 4 * self.config.hidden_size)

    def _numbers(self, begin: str) -> list[int]:
        found = []
        for name, shape in shapes(self.config):
            if name.startswith(begin):
                found.append(shape[0] * (shape[1] if len(shape) == 2 else 1))
        return found

    @property
    def inputs(self) -> int:
        return 4 * self.config.hidden_size * self.config.num_layers * TOKENS

    @property
    def working(self) -> int:
        c = self.config
        return (42 * c.hidden_size + 8 * c.intermediate_size + 5 * c.num_heads * c.head_dim) * TOKENS

    def states(self, optimizer: str) -> int:
        whole = 16 * self.config.num_parameters
        return whole if optimizer == "AdamW" else whole - 4 * self.matrices

    def peak(self, devices: int, optimizer: str) -> float:
        # Alone nothing is gathered: autocast's copy of a layer and of the embedding, and the gradient of its lookup.
        gathered, head = (12, 8) if devices > 1 else (2, 6)
        stays = 4 if devices > 1 else 6
        layers = stays * self.embedding + gathered * self.layer + self.inputs + self.working
        return self.states(optimizer) / devices + max(layers, head * self.embedding + self.inputs)


MODELS = [Arithmetic(Gemma2Config.preset(size)) for size in SIZES]


def shown(values: list[float], digits: int = 1) -> list[str]:
    return [f"{value:.{digits}f}" for value in values]


def test_memory_by_kind() -> None:
    rows = table(PAGE, "In GB", "", *SIZES)
    assert rows == {
        "weights, gradients, AdamW, whole": shown([m.states("AdamW") / 1e9 for m in MODELS]),
        "the same with Muon": shown([m.states("Muon") / 1e9 for m in MODELS]),
        "layers that are gathered": shown([12 * m.layer / 1e9 for m in MODELS]),
        "embedding and its gradient": shown([4 * m.embedding / 1e9 for m in MODELS]),
        "layers' inputs": shown([m.inputs / 1e9 for m in MODELS]),
        "activations of one layer": shown([m.working / 1e9 for m in MODELS]),
        "activations of all layers, without `--recompute": shown(
            [m.working * m.config.num_layers / 1e9 for m in MODELS]
        ),
    }


def test_memory_at_the_peak() -> None:
    rows = table(PAGE, "In GB", "at the peak on each device", *SIZES)
    for name, cells in rows.items():
        devices, optimizer = re.fullmatch(r"(\d+) devices?, (\w+)", name).groups()
        assert cells == shown([m.peak(int(devices), optimizer) / 1e9 for m in MODELS]), name
    assert len(rows) == 6


def test_traffic() -> None:
    rows = table(PAGE, "## Traffic", f"{TOKENS} tokens on each of 8 devices", *SIZES)
    moved = [8 * m.config.num_parameters * 7 / 8 for m in MODELS]
    work = [6 * m.config.num_parameters * TOKENS * 4 / 3 for m in MODELS]
    seconds = {"s over NVLink": [x / 450e9 for x in moved], "s over one Inf": [x / 50e9 for x in moved],
               "s at 400": [x / 400e12 for x in work], "GB": [x / 1e9 for x in moved],
               "10^15": [x / 1e15 for x in work]}  # fmt: skip
    for begin, values in seconds.items():
        cells = next(cells for name, cells in rows.items() if name.startswith(begin))
        for cell, value in zip(cells, values, strict=True):
            assert cell == f"{value:.{len(cell.partition('.')[2])}f}", (begin, cell, value)
    assert len(rows) == len(seconds)


# The launch files


def flags_of(words: list[str]) -> set[str]:
    """The names of the flags behind `cabochon train pretrain`."""
    own = words[words.index("pretrain") :]
    return {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in own if word.startswith("--")}


def known() -> set[str]:
    return set(TrainConfig.__dataclass_fields__) | {"data", "out"}


def test_the_slurm_script() -> None:
    script = EXAMPLES / "slurm-train.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    words = script.read_text().partition("srun")[2].split()
    assert flags_of(words) - known() == set()
    assert flags_of(words) >= {"recompute", "sharded_checkpoints"}


def test_the_kubernetes_file() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes-train.yml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"job-name": name}
    (container,) = spec["containers"]
    command = container["command"]
    nodes, endpoint = (next(w for w in command if w.startswith(f"--{k}=")) for k in ("nnodes", "rdzv-endpoint"))
    assert nodes == f"--nnodes={job['spec']['completions']}"
    assert endpoint == f"--rdzv-endpoint={name}-0.{name}:{service['spec']['ports'][0]['port']}"
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in command
    assert flags_of(command) - known() == set()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.slow
def test_the_slurm_script_trains(tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs, on two processes of this machine."""
    for name, body in {"scontrol": "echo localhost", "srun": 'shift; exec "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "gems.jsonl").write_text("".join(json.dumps({"text": f"gem {i}"}) + "\n" for i in range(20)))
    start = [sys.executable, "-m", "cabochon", "init", "--preset", "tiny", "--out", "start"]
    settings: dict[str, Any] = environment(tmp_path)
    subprocess.run(start, cwd=tmp_path, env=settings, check=True)
    settings["PATH"] = f"{tmp_path}:{settings['PATH']}"
    settings |= {"SLURM_JOB_NODELIST": "n", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7",
                 "MODEL": "start", "DATA": "gems.jsonl", "OUT": "out"}  # fmt: skip
    script = [EXAMPLES / "slurm-train.sh", "--rows", "2", "--length", "16", "--steps", "2", "--device", "cpu"]
    done = subprocess.run(script, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
