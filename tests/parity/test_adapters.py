"""Adapters beside a model compute and learn what PEFT's do (tests/golden/adapters), and its files are ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import adapter_parameters, merge
from cabochon.weights.adapters import load_adapter, save_adapter
from cabochon.weights.names import from_hf, to_hf
from support import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
BASE, PEFT = GOLDEN / "merge" / "adapters" / "peft.safetensors", GOLDEN / "adapters" / "peft.safetensors"
THEIRS = {name: BASE.parent / name for name in ("plain", "second", "rslora", "dora", "patterns", "layers", "regex")}
OURS = {name: PEFT.parent / name for name in ("ours-lora", "ours-dora")}
FOLDERS = THEIRS | OURS
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}


def golden(file, prefix):
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}


def base():
    with safe_open(BASE, "pt") as file:
        described = json.loads(file.metadata()["config"])
    model = Gemma2(Gemma2Config.from_hf({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **described}))
    model.load_state_dict({from_hf(name): tensor for name, tensor in golden(BASE, "base/").items()})
    return model.eval()


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_gradients_are_pefts(name):
    model, expected = base(), golden(PEFT, f"{name}/")
    ids, probe = golden(PEFT, "ids")[""], golden(PEFT, "probe")[""]
    plain = model(ids)
    load_adapter(model, FOLDERS[name])
    logits = model(ids)
    assert relative_error(plain, expected["logits"]) > 1e-2  # the adapter matters
    # PEFT's own logits are up to 1.2e-5 from those in float64 (rslora, whose update is large), by the processor.
    assert relative_error(logits, expected["logits"]) < 3e-5
    (logits * probe).sum().backward()
    parameters = adapter_parameters(model)
    assert len(parameters) == len(expected) - 1
    for key, parameter in parameters.items():
        module, _, part = key.rpartition(".")
        theirs = f"base_model.model.{to_hf(f'{module}.weight').removesuffix('.weight')}.{PARTS[part]}"
        # Gradients pass through the model twice.
        assert relative_error(parameter.grad, expected[f"gradient/{theirs}"]) < 6e-5
    merge(model)
    assert relative_error(model(ids), expected["logits"]) < 5e-5


@pytest.mark.parametrize("name", OURS)
def test_what_peft_has_read_is_what_is_written(name, tmp_path):
    model = base()
    load_adapter(model, OURS[name])
    save_adapter(model, tmp_path / "again", base_model_name="google/gemma-2-2b")
    for file in OURS[name].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("---\nbase_model: google/gemma-2-2b\nlibrary_name: peft\n")


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_wrote_is_written_again(name, tmp_path):
    """Not byte by byte: whole names stand where PEFT had a pattern."""
    first, second = base(), base()
    load_adapter(first, THEIRS[name])
    save_adapter(first, tmp_path / "again", base_model_name=None)
    load_adapter(second, tmp_path / "again")
    before, after = adapter_parameters(first), adapter_parameters(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = golden(PEFT, "ids")[""]
    assert torch.equal(first(ids), second(ids))
