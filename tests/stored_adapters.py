"""The small base model of tests/golden/merge/adapters, and the adapters that PEFT wrote for it."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from cabochon.model.config import Gemma2Config
from cabochon.weights.names import from_hf

GOLDEN = Path(__file__).parent / "golden" / "merge" / "adapters"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/adapter_config.json"))


def _load() -> tuple[dict[str, Tensor], Gemma2Config]:
    with safe_open(GOLDEN / "peft.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        described = {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            **json.loads(file.metadata()["config"]),
        }
    return tensors, Gemma2Config.from_hf(described)


TENSORS, CONFIG = _load()
BASE = {from_hf(name.removeprefix("base/")): t for name, t in TENSORS.items() if name.startswith("base/")}


def merged_by_peft(name: str) -> dict[str, Tensor]:
    """Tensors that an adapter changes, after PEFT's `merge_and_unload`, by our names."""
    prefix = f"merged/{name}/"
    return {from_hf(key.removeprefix(prefix)): t for key, t in TENSORS.items() if key.startswith(prefix)}
