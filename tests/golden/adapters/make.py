"""Makes peft.safetensors beside it: logits of adapted models as PEFT computes them, and gradients of their adapters;
and the folders `ours-*`, which cabochon wrote and PEFT has read.

Run with an environment that has peft, transformers and torch 2.13.0:

    OMP_NUM_THREADS=1 PYTHONPATH=src python tests/golden/adapters/make.py

The base and PEFT's own adapters are those of ../merge/adapters. `NAME/logits` are those of `ids`; `NAME/gradient/...`
belong to the sum of logits times `probe`. Everything is float32.
"""

import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from cabochon.model.config import Gemma2Config as OurConfig
from cabochon.model.gemma2 import Gemma2
from cabochon.model.lora import LoraConfig, adapter_parameters, attach
from cabochon.weights.adapters import save_adapter

HERE = Path(__file__).parent
THEIRS = HERE.parent / "merge" / "adapters"
SEED = 1106
NAMES = ("plain", "second", "rslora", "dora", "patterns", "layers", "regex")
OURS = {
    "ours-lora": LoraConfig(rank=3, alpha=5, targets=("q", "down"), seed=1),
    "ours-dora": LoraConfig(rank=2, alpha=0.5, dora=True, rslora=True, dropout=0.25, seed=2),
}


def base():
    """transformers' model with the weights of ../merge/adapters, and its configuration."""
    with safe_open(THEIRS / "peft.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        names = [name for name in file.keys() if name.startswith("base/")]  # noqa: SIM118 - not a mapping
        weights = {name.removeprefix("base/"): file.get_tensor(name) for name in names}
    model = Gemma2ForCausalLM(Gemma2Config(**config, attn_implementation="eager")).float().eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    return model, config


def write_ours(name):
    """An adapter of cabochon's with random weights; the base's weights only matter to DoRA's lengths."""
    config = OurConfig.from_hf({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **base()[1]})
    torch.manual_seed(SEED)
    model = Gemma2(config)
    attach(model, OURS[name])
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shutil.rmtree(HERE / name, ignore_errors=True)
    save_adapter(model, HERE / name, base_model_name="google/gemma-2-2b")
    (HERE / name / "README.md").unlink()


def computed(folder, ids, probe):
    model = PeftModel.from_pretrained(base()[0], folder, is_trainable=True).eval()
    logits = model(input_ids=ids).logits
    (logits * probe).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    named = {f"gradient/{name.replace('.default', '')}": gradient for name, gradient in gradients.items()}
    return {"logits": logits.detach(), **named}


def main():
    warnings.simplefilter("ignore")
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 24, (2, 11), generator=draw)
    probe = torch.randn(2, 11, 24, generator=draw)
    tensors = {"ids": ids, "probe": probe}
    for name in OURS:
        write_ours(name)
    for name in (*NAMES, *OURS):
        folder = (HERE if name in OURS else THEIRS) / name
        tensors |= {f"{name}/{key}": value.clone() for key, value in computed(folder, ids, probe).items()}
    save_file(tensors, HERE / "peft.safetensors", {name: version(name) for name in ("peft", "transformers", "torch")})
    (HERE / "peft.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
