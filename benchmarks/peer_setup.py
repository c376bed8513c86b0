"""Environments and model files of the peers. Each step is left out when its result is there already."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where no build of torch for this kind of machine is on a local disk, pip may bring one with CUDA: several GB.
TORCH = ("torch==2.13.0", "numpy==2.4.6", "setuptools==84.2.1")


@dataclass(frozen=True)
class Environment:
    """What `pip install` gets, call by call. torch comes first and is named again, so that nothing replaces it."""

    installs: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "llama": Environment((("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),)),
    "openvino": Environment(
        (
            TORCH,
            (
                *TORCH,
                # optimum-intel refuses to export Gemma 2 with anything newer.
                "transformers==5.0.0",
                "huggingface_hub==1.21.0",
                "nncf==3.4.0",
                "openvino==2026.4.1",
                "openvino-tokenizers==2026.4.1.0",
                "openvino-genai==2026.4.1.0",
                "requests==2.34.2",
            ),
            # It asks for torchvision, which only its image models import, and whose builds bring another torch.
            ("--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0"),
        )
    ),
    "transformers": Environment((TORCH, (*TORCH, "transformers==5.24.0"))),
}

# Name below the preset's folder -> environment (None: the one that runs this) and the script that makes it.
FILES: dict[str, tuple[str | None, str]] = {
    "hf": (None, "peer_model.py"),
    "cabochon-int8": (None, "peer_model.py"),
    "cabochon-int4": (None, "peer_model.py"),
    "bf16.gguf": ("llama", "peer_llama_files.py"),
    "q8_0.gguf": ("llama", "peer_llama_files.py"),
    "q4_0.gguf": ("llama", "peer_llama_files.py"),
    "openvino-int8": ("openvino", "peer_openvino_files.py"),
    "openvino-int4": ("openvino", "peer_openvino_files.py"),
}


def python_of(root: Path, environment: str | None) -> Path:
    """The interpreter of a peer's environment."""
    return Path(sys.executable) if environment is None else root / environment / "bin" / "python"


def is_ready(root: Path, environment: str) -> bool:
    """Whether everything that this version of the table asks for was installed."""
    stamp = root / environment / "installed.txt"
    return stamp.exists() and stamp.read_text() == _wanted(environment)


def environment(root: Path, name: str) -> bool:
    """Make one environment; whether that worked."""
    if is_ready(root, name):
        print(f"{name}: environment is there")
        return True
    shutil.rmtree(root / name, ignore_errors=True)
    print(f"{name}: making the environment")
    root.mkdir(parents=True, exist_ok=True)
    # llama.cpp is compiled, for this processor. What it needs for images is not wanted.
    cmake = f"-DLLAVA_BUILD=OFF {os.environ.get('CMAKE_ARGS', '')}"
    commands = [[sys.executable, "-m", "venv", str(root / name)]]
    pip = [str(python_of(root, name)), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    commands += [[*pip, *packages] for packages in ENVIRONMENTS[name].installs]
    for command in commands:
        if not _run(command, root / f"{name}.log", {"CMAKE_ARGS": cmake}):
            return False
    (root / name / "installed.txt").write_text(_wanted(name))
    return True


def files(root: Path, preset: str, name: str) -> bool:
    """Make one model file; whether it is there afterwards."""
    folder = root / preset
    env, script = FILES[name]
    if (folder / name).exists():
        print(f"{preset}/{name}: is there")
        return True
    if env is not None and not is_ready(root, env):
        print(f"{preset}/{name}: left out, there is no environment {env!r}")
        return False
    print(f"{preset}/{name}: making it")
    folder.mkdir(parents=True, exist_ok=True)
    source = preset if name == "hf" else str(folder / "hf")
    command = [str(python_of(root, env)), str(HERE / script), source, str(folder / name)]
    return _run(command, folder / f"{name}.log", {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})


def _wanted(environment: str) -> str:
    return "\n".join(" ".join(packages) for packages in ENVIRONMENTS[environment].installs) + "\n"


def _run(command: list[str], log: Path, extra: dict[str, str]) -> bool:
    started = time.perf_counter()
    with log.open("a") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **extra}).returncode
    lines = log.read_text(errors="replace").splitlines()
    if code:
        print("  failed:", *lines[-8:], f"the rest is in {log}", sep="\n    ")
    else:
        print(f"  {time.perf_counter() - started:.0f} s; {lines[-1][:150] if lines else 'done'}")
    return code == 0
