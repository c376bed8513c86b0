"""What tensors are called here and in Hugging Face folders, and the shape of each: one table for both ways.

Dimension letters: D hidden size, N query heads, K key-value heads, H head size, F feed-forward size, V vocabulary.
"""

import re
from collections.abc import Iterator

from cabochon.model.config import Gemma2Config

_WHOLE = {
    "embedding.weight": ("model.embed_tokens.weight", "VD"),
    "final_norm.weight": ("model.norm.weight", "D"),
}
_PER_LAYER = {
    "pre_attention_norm.weight": ("input_layernorm.weight", "D"),
    "attention.q.weight": ("self_attn.q_proj.weight", "ND"),
    "attention.k.weight": ("self_attn.k_proj.weight", "KD"),
    "attention.v.weight": ("self_attn.v_proj.weight", "KD"),
    "attention.o.weight": ("self_attn.o_proj.weight", "DN"),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "D"),
    "pre_mlp_norm.weight": ("pre_feedforward_layernorm.weight", "D"),
    "mlp.gate.weight": ("mlp.gate_proj.weight", "FD"),
    "mlp.up.weight": ("mlp.up_proj.weight", "FD"),
    "mlp.down.weight": ("mlp.down_proj.weight", "DF"),
    "post_mlp_norm.weight": ("post_feedforward_layernorm.weight", "D"),
}
SCORE = "score.weight"  # the head [1, D] of a reward model, called so on both sides
# What a quantised matrix has beside its weight; in folders the weight's own name leads, as others write it, too.
_PACKED = {"scale": "weight_scale", "zero": "weight_zero_point"}
TIED_HEAD = "lm_head.weight"  # a copy of the embedding that some folders hold, under its Hugging Face name
# Constants that old exporters stored beside the weights; they follow from the configuration.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")

_TO_HF = {ours: theirs for ours, (theirs, _) in (_WHOLE | _PER_LAYER).items()}
_TO_HF |= {
    ours.removesuffix("weight") + mine: theirs.removesuffix("weight") + other
    for ours, (theirs, letters) in (_WHOLE | _PER_LAYER).items()
    if len(letters) == 2
    for mine, other in _PACKED.items()
}
_TO_HF[SCORE] = SCORE
_FROM_HF = {theirs: ours for ours, theirs in _TO_HF.items()}
_OUR_LAYER = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)
_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.ASCII)


def to_hf(name: str) -> str:
    """The Hugging Face name of one of our parameters. Raises `KeyError` for any other name."""
    found = _OUR_LAYER.fullmatch(name)
    return f"model.layers.{found[1]}.{_TO_HF[found[2]]}" if found else _TO_HF[name]


def from_hf(name: str) -> str:
    """Our name of a Hugging Face tensor. Raises `KeyError` for a name that Gemma 2 does not have."""
    found = _THEIR_LAYER.fullmatch(name)
    return f"layers.{found[1]}.{_FROM_HF[found[2]]}" if found else _FROM_HF[name]


def shapes(config: Gemma2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter's name (ours) and shape, in the order in which a pass through the model meets them."""
    size = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
        "F": config.intermediate_size,
    }
    yield "embedding.weight", (size["V"], size["D"])
    for layer in range(config.num_layers):
        for name, (_, letters) in _PER_LAYER.items():
            yield f"layers.{layer}.{name}", tuple(size[letter] for letter in letters)
    yield "final_norm.weight", (size["D"],)


def is_harmless(name: str) -> bool:
    """Whether a stored tensor of this (Hugging Face) name can be left aside."""
    return _HARMLESS.fullmatch(name) is not None
