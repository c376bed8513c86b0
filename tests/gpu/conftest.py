"""What needs a GPU. The kernels themselves can also be looked at without one, by Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch

from cabochon.model.kernels import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
HOW = "needs an NVIDIA GPU: run `pytest -m gpu tests/gpu` on a machine that has one"
KERNELS_HOW = f"{HOW}, or `TRITON_INTERPRET=1 pytest -m gpu tests/gpu` where Triton is installed"


@pytest.fixture
def gpu() -> str:
    """The device of tests that need a whole GPU."""
    if not torch.cuda.is_available():
        pytest.skip(HOW)
    return "cuda"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which kernels run."""
    if torch.cuda.is_available():
        return "cuda"
    if not INTERPRETED:
        pytest.skip(KERNELS_HOW)
    monkeypatch.setattr(cuda, "DEVICES", {"cuda", "cpu"})
    return "cpu"
