"""Makes the folders beside it: small adapters that PEFT wrote, and in peft.safetensors what it makes of them.

Run with an environment that has peft, transformers and torch 2.13.0:

    OMP_NUM_THREADS=1 python tests/golden/merge/adapters/make.py

The base is a small Gemma 2 with random weights, float32 (`base/...`); `merged/NAME/...` are the tensors after
`merge_and_unload`, as far as they changed. Adapters get random weights, since PEFT starts with B = 0.
"""

import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

HERE = Path(__file__).parent
SEED = 2406
CONFIG = {
    "vocab_size": 24,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 14,
    "query_pre_attn_scalar": 6,
    "sliding_window": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "plain": LoraConfig(r=3, lora_alpha=8, target_modules=ATTENTION),
    "second": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=[*ATTENTION, "gate_proj"],
        rank_pattern={"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"gate_proj": 7, "model.layers.0.self_attn.v_proj": 5},
    ),
    "layers": LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, layers_to_transform=[1]),
    "regex": LoraConfig(
        r=2, lora_alpha=4, target_modules=r".*\.(q_proj|up_proj)", exclude_modules=["layers.0.mlp.up_proj"]
    ),
    "embedding": LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "k_proj"]),
    "saved": LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, modules_to_save=["norm", "embed_tokens"]),
}


def base():
    torch.manual_seed(SEED)
    model = Gemma2ForCausalLM(Gemma2Config(**CONFIG)).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def randomize(model, number):
    draw = torch.Generator().manual_seed(SEED + number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=draw))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def main():
    warnings.simplefilter("ignore")
    original = {name: tensor.clone() for name, tensor in weights(base()).items()}
    tensors = {f"base/{name}": tensor for name, tensor in original.items()}
    for number, (name, config) in enumerate(ADAPTERS.items()):
        model = get_peft_model(base(), config)
        randomize(model, number)
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink(missing_ok=True)
        (HERE / name / "adapter_model.safetensors").chmod(0o644)
        merged = weights(model.merge_and_unload())
        changed = {key: tensor for key, tensor in merged.items() if not torch.equal(tensor, original[key])}
        tensors |= {f"merged/{name}/{key}": tensor.clone() for key, tensor in changed.items()}
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    save_file(tensors, HERE / "peft.safetensors", {**versions, "config": json.dumps(CONFIG)})
    (HERE / "peft.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
