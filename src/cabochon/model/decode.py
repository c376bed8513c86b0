"""The network once more for a step of one token a sequence on a GPU, in as few kernels as it can be.

The formulas are those of `gemma2.py`, which stays what everything is held to. Small steps are joined across what are
separate modules there, since a kernel that does next to nothing takes as long as reading 5 MB of weights: a norm, the
sum with what went before and the norm that follows; turning queries and keys and putting the keys away.

R rows, one of each sequence. D hidden size, N query heads, K key-value heads, H head size.
"""

from typing import Any

from torch import Tensor

from cabochon.model.fixed import FixedBatch
from cabochon.model.gemma2 import Gemma2, rotary
from cabochon.model.kernels import cuda
from cabochon.model.together import gated, together


def step(model: Gemma2, batch: FixedBatch) -> Tensor:
    """Logits float32 [R, V] behind the new tokens of a batch, whose keys and values are stored."""
    if model.attention_backend is not None or not cuda.usable(batch.pool.keys[0]):  # or module by module
        return model.head(model.hidden(batch.ids, batch.positions, cache=batch)[0])
    from cabochon.model.kernels.cuda.elementwise import capped

    logits: Tensor = model.embedding.project(_hidden(model, batch))
    return capped(logits, model.config.final_softcap)


def _hidden(model: Gemma2, batch: FixedBatch) -> Tensor:
    """Final hidden states [R, D], normed."""
    from cabochon.model.kernels.cuda.elementwise import add_norm_norm, rms_norm

    config, positions = model.config, batch.positions
    rotation = rotary(positions, config.head_dim, config.rope_theta)
    sights = batch.extend(positions)
    x = model.embed(batch.ids)[0]
    blocks: list[Any] = list(model.layers)
    normed = rms_norm(x, blocks[0].pre_attention_norm.weight, config.norm_eps)
    for i, block in enumerate(blocks):
        mixed = _attention(block.attention, normed, rotation, batch, sights[config.is_local(i)])
        norms = block.post_attention_norm.weight, block.pre_mlp_norm.weight
        x, normed = add_norm_norm(x, mixed, *norms, config.norm_eps)
        out = block.mlp.down(gated(normed, block.mlp.gate, block.mlp.up))
        following = blocks[i + 1].pre_attention_norm if i + 1 < len(blocks) else model.final_norm
        x, normed = add_norm_norm(x, out, block.post_mlp_norm.weight, following.weight, config.norm_eps)
    return normed


def _attention(layer: Any, x: Tensor, rotation: tuple[Tensor, Tensor], batch: FixedBatch, sight: Any) -> Tensor:
    """[R, D] -> [R, D]."""
    from cabochon.model.kernels.cuda.attend import Blocks, attend, rotate_and_store

    keys, values = batch.pool.keys[layer.index // 2], batch.pool.values[layer.index // 2]
    projected = together(x, (layer.q, layer.k, layer.v))
    q, k, v = (part.unflatten(-1, (-1, layer.head_dim)) for part in projected)  # [R, heads, H]
    rotate_and_store(q, k, v, *rotation, keys, values, sight.pages, sight.offsets)
    blocks = Blocks(batch.numbers, batch.numbers, batch.ones, 1, batch.pool.config.max_position)
    settings = {"window": sight.window, "scale": layer.scale, "softcap": layer.softcap}
    mixed = attend(q, keys, values, sight.table, blocks, sight.positions, **settings)
    out: Tensor = layer.o(mixed.flatten(1))
    return out
