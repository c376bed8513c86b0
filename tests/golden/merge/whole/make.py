"""Whole merges by mergekit 0.1.5, to check how configurations are read: gradients, filters, slices, precedence.

    python tests/golden/merge/whole/make.py     in an environment with torch 2.13.0 and mergekit 0.1.5

Writes `<name>.safetensors` for each configuration below. The models are made anew from a seed, here and in the test.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SIZES = {"V": 24, "D": 8, "N": 8, "K": 4, "F": 12}
LAYERS = 4
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": SIZES["V"], "hidden_size": SIZES["D"],
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "intermediate_size": SIZES["F"], "query_pre_attn_scalar": 4, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "sliding_window": 16, "max_position_embeddings": 64, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip
TENSORS = {
    "input_layernorm": "D", "self_attn.q_proj": "ND", "self_attn.k_proj": "KD", "self_attn.v_proj": "KD",
    "self_attn.o_proj": "DN", "post_attention_layernorm": "D", "pre_feedforward_layernorm": "D",
    "mlp.gate_proj": "FD", "mlp.up_proj": "FD", "mlp.down_proj": "DF", "post_feedforward_layernorm": "D",
}  # fmt: skip
CONFIGS = {
    "slerp": """
slices:
  - sources:
      - {model: A, layer_range: [0, 4]}
      - {model: B, layer_range: [0, 4]}
merge_method: slerp
base_model: A
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "linear": """
models:
  - model: A
    parameters: {weight: [{filter: down_proj, value: [0, 2]}, {value: 0.4}]}
  - model: B
    parameters: {weight: [0.1, 0.9]}
  - model: C
    parameters: {weight: {filter: mlp, value: 1.5}}
parameters: {weight: 0.25, normalize: true}
merge_method: linear
dtype: float32
""",
    "ties": """
models:
  - model: B
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: C
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0.8}]}
merge_method: ties
base_model: A
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "passthrough": """
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources:
      - model: B
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: [0.25, 0.75]}, {value: 1}]}
merge_method: passthrough
dtype: float32
""",
    "modules": """
modules:
  default:
    slices:
      - sources:
          - {model: A, layer_range: [0, 2]}
          - {model: B, layer_range: [2, 4], parameters: {weight: 0.3}}
        parameters: {lambda: 0.5}
      - sources:
          - {model: A, layer_range: [3, 4]}
          - {model: C, layer_range: [3, 4]}
        parameters: {weight: [0.2, 0.6]}
    parameters: {lambda: 2.0}
merge_method: task_arithmetic
base_model: A
parameters: {weight: 1.0, lambda: 3.0}
dtype: float32
""",
}


def write_models(folder: Path) -> None:
    """Three related models A, B and C."""
    names = {"model.embed_tokens.weight": "VD", "model.norm.weight": "D"}
    names |= {f"model.layers.{i}.{n}.weight": letters for i in range(LAYERS) for n, letters in TENSORS.items()}
    generator = torch.Generator().manual_seed(7)
    start = {n: torch.randn([SIZES[c] for c in letters], generator=generator) for n, letters in names.items()}
    for model, size in (("A", 0.0), ("B", 0.5), ("C", 0.3)):
        (folder / model).mkdir()
        tensors = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in start.items()}
        save_file(tensors, folder / model / "model.safetensors", {"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps(CONFIG))


def configuration(name: str, folder: Path) -> str:
    """The YAML of a merge of the models in a folder."""
    return re.sub(r"model: ([ABC])\b", rf"model: {folder}/\1", CONFIGS[name])


def main() -> None:
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as made:
            work = Path(made)
            write_models(work)
            (work / "config.yml").write_text(configuration(name, work))
            program = Path(sys.executable).with_name("mergekit-yaml")
            # Where the number of layers changes it fails, but with the configuration, and after the weights.
            subprocess.run([program, "config.yml", "out", "--no-copy-tokenizer"], cwd=work, check=False)
            (found,) = (work / "out").glob("*.safetensors")
            tensors = load_file(found)
            tensors.pop("lm_head.weight", None)
            save_file(tensors, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    main()
