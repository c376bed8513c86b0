"""What several test folders share: small models, and the same weights in the reference implementation."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2
from cabochon.weights.names import from_hf

# Shapes in which every feature matters: a head size that is not hidden/heads, a query scale that is not the head
# size, sqrt(hidden) that bf16 cannot hold, a window far shorter than the inputs, an odd number of layers, caps low
# enough to bite.
SMALL = Gemma2Config(
    vocab_size=211, hidden_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=56,
    query_pre_attn_scalar=10, sliding_window=5, max_position=320, attn_softcap=3.0, final_softcap=5.0,
)  # fmt: skip


def small_model(config: Gemma2Config = SMALL, seed: int = 0, size: float = 0.3) -> Gemma2:
    """A model whose weights are large enough for both soft caps to bite."""
    torch.manual_seed(seed)
    model = Gemma2(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=size)
    return model


def reference_model(config: Gemma2Config, seed: int = 0, size: float = 0.3) -> tuple[Gemma2, Any]:
    """Our model and transformers' with the same weights, float32."""
    from transformers import Gemma2Config as TheirConfig
    from transformers import Gemma2ForCausalLM

    settings = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    theirs = Gemma2ForCausalLM(TheirConfig(**settings, attn_implementation="eager")).eval()
    ours = small_model(config, seed, size)
    ours_by_their_name = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    with torch.no_grad():
        for name, tensor in ours_by_their_name.items():
            tensor.copy_(ours.get_parameter(from_hf(name)))
    return ours, theirs


@st.composite
def configs(draw: st.DrawFn) -> Gemma2Config:
    """Any small Gemma 2: grouped heads, odd layer counts, windows from 1, sizes that share no factor."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return dataclasses.replace(
        SMALL,
        vocab_size=draw(st.integers(110, 300)),
        # transformers wants a multiple of the heads; norms over a few numbers alone only amplify rounding
        hidden_size=heads * draw(st.integers(24 // heads + 1, 24 // heads + 9)),
        num_layers=draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        num_heads=heads,
        head_dim=2 * draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(12, 40)),
        query_pre_attn_scalar=draw(st.integers(1, 40)),
        sliding_window=draw(st.integers(1, 20)),
        attn_softcap=draw(st.sampled_from([1.0, 4.0, 50.0])),
        final_softcap=draw(st.sampled_from([2.0, 30.0])),
    )


def random_ids(config: Gemma2Config, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length]"""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, length), generator=draw)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp_min(1e-6))
