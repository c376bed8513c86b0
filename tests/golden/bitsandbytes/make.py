"""Write the golden folders beside this script: a small model as transformers saves it with bitsandbytes settings.

    python tests/golden/bitsandbytes/make.py

Needs bitsandbytes and accelerate beside the test dependencies; made with bitsandbytes 0.50.2 and transformers 5.24.
Each folder also gets `expected.safetensors`: every matrix as bitsandbytes itself gives it back, in float32.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM

HERE = Path(__file__).parent
KINDS = {
    "int8": dict(load_in_8bit=True),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


def main() -> None:
    """Make everything anew."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=112, hidden_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
        intermediate_size=52, query_pre_attn_scalar=12, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    plain = HERE / "plain"
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    for name, settings in KINDS.items():
        options = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink()
        save_file(dequantised(model), HERE / name / "expected.safetensors")
    shutil.rmtree(plain)


def dequantised(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every quantised matrix in float32, by bitsandbytes' own functions."""
    import bitsandbytes.functional as functional

    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            state.dtype = torch.float32
            found[f"{name}.weight"] = functional.dequantize_4bit(module.weight.data, state).reshape(state.shape)
        elif type(module).__name__ == "Linear8bitLt":
            found[f"{name}.weight"] = functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    return found


if __name__ == "__main__":
    main()
