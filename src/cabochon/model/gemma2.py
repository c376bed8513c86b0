"""Gemma 2, top to bottom. Source: arXiv 2408.00118, section 2.

    ids -> embedding * sqrt(D) -> layers -> norm -> (hidden)  ->  tied head -> soft cap -> logits

Dimension letters: B batch, T positions, D hidden size, N query heads, K key-value heads, H head size,
F feed-forward size, V vocabulary.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from cabochon.model.attention import attention
from cabochon.model.cache import Cache
from cabochon.model.config import Gemma2Config
from cabochon.model.kernels import elementwise
from cabochon.model.linear import Embedding, Linear
from cabochon.model.visibility import Visibility


class Gemma2(nn.Module):
    """The decoder. `forward` is `head(hidden(ids))`: whoever needs no whole logits stops after `hidden`."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.attention_backend: str | None = None  # a name from attention.BACKENDS; None takes the best
        self.recompute = False  # keep only each layer's input for the way back, and run the layer again
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = RMSNorm(config)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits float32 [B, T, V]; arguments as in `hidden`."""
        return self.head(self.hidden(ids, positions, documents, cache))

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, D], normed, in the weights' dtype.

        Args:
            ids: int64 [B, T].
            positions: int64 [B, T], -1 for padding; None counts on from what the cache holds.
            documents: int64 [B, T]; a query sees only keys of its own document. Not with a cache.
            cache: where keys and values of earlier positions are and these are added.
        """
        in_order = positions is None and documents is None
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        visible: Any = self.visibility(positions, documents, in_order) if cache is None else cache.extend(positions)
        rotation = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(ids)
        for i, block in enumerate(self.layers):
            sight = visible[self.config.is_local(i)]
            run = _recomputed(block) if self.recompute and torch.is_grad_enabled() else block
            x = run(x, rotation, sight, cache, self.attention_backend)
        normed: Tensor = self.final_norm(x)
        return normed

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer takes: scaled embeddings [B, T, D] of ids int64 [B, T]."""
        out: Tensor = self.embedding(ids) * self._embedding_scale()
        return out

    def visibility(self, positions: Tensor, documents: Tensor | None, in_order: bool = False) -> dict[bool, Visibility]:
        """Who sees whom among positions [B, T], in local layers (True) and in global ones."""
        windows = {True: self.config.sliding_window, False: None}
        return {
            local: Visibility(positions, positions, window, documents, documents, in_order)
            for local, window in windows.items()
        }

    def head(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits float32 [..., V] of hidden states [..., D]; the weight is the embedding's."""
        return soft_cap(self.embedding.project(hidden).float(), self.config.final_softcap)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are kept in: the weights' dtype, and bfloat16 beside quantised weights."""
        dtype = self.embedding.weight.dtype
        return dtype if dtype.is_floating_point else torch.bfloat16

    def _embedding_scale(self) -> float:
        # Rounded to the weights' dtype as the published models were trained: 9b in bf16 has 59.75, not 59.866.
        return torch.tensor(self.config.hidden_size**0.5, dtype=self.cache_dtype).item()


class Block(nn.Module):
    """One layer: attention and feed-forward, each between a norm before and a norm after."""

    def __init__(self, config: Gemma2Config, index: int) -> None:
        super().__init__()
        self.pre_attention_norm = RMSNorm(config)
        self.attention = Attention(config, index)
        self.post_attention_norm = RMSNorm(config)
        self.pre_mlp_norm = RMSNorm(config)
        self.mlp = GeGLU(config)
        self.post_mlp_norm = RMSNorm(config)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Any,  # a Visibility, or what the cache's `extend` gave for this kind of layer
        cache: Cache | None,
        backend: str | None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        mixed = self.attention(self.pre_attention_norm(x), rotation, visible, cache, backend)
        x = self.post_attention_norm.added_to(x, mixed)
        return self.post_mlp_norm.added_to(x, self.mlp(self.pre_mlp_norm(x)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; N * H need not equal D."""

    def __init__(self, config: Gemma2Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5  # not always head_dim ** -0.5: 27b has 144 and 128
        self.softcap = config.attn_softcap
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, wide)
        self.k = Linear(config.hidden_size, narrow)
        self.v = Linear(config.hidden_size, narrow)
        self.o = Linear(wide, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Any,  # a Visibility, or what the cache's `extend` gave for this kind of layer
        cache: Cache | None,
        backend: str | None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k = rotate(q, rotation), rotate(k, rotation)
        settings = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, heads, T, H]
        if cache is None:
            mixed = attention(q, k, v, visible, **settings)
        else:
            mixed = cache.attend(self.index, q, k, v, visible, **settings)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class GeGLU(nn.Module):
    """Feed-forward gated by a tanh-approximated GELU."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate(x), self.up(x)
        fused = elementwise.gelu_times(gate, up)
        out: Tensor = self.down(gelu(gate, approximate="tanh") * up if fused is None else fused)
        return out


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight stored around zero: the factor is 1 + weight."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; in float32 up to the final cast, as the torch references do."""
        fused = elementwise.rms_norm(x, self.weight, self.eps)
        if fused is not None:
            return fused
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """base + norm of x, both [..., D]."""
        fused = elementwise.add_norm(base, x, self.weight, self.eps)
        return base + self(x) if fused is None else fused


def _recomputed(block: nn.Module) -> Callable[..., Tensor]:
    """Activation checkpointing (arXiv 1604.06174)."""
    from torch.utils.checkpoint import checkpoint  # takes a second to import, and only training needs it

    return partial(checkpoint, block, use_reentrant=False)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine float32 [B, T, 1, H/2] of positions [B, T] (arXiv 2104.09864)."""
    angles = positions[:, :, None, None].float() * _frequencies(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


@lru_cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """float32 [H/2], made on the CPU: at position 8000 the last bit of another power function would be seen."""
    with torch.inference_mode(False), torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / theta**exponents).to(device)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + H/2) of x [B, T, heads, H] by their angles, in float32. May reuse x."""
    fused = elementwise.rotated(x, *rotation)
    if fused is not None:
        return fused
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Smoothly keep x within (-cap, cap); the slope at 0 is 1. May reuse x."""
    if cap is None:
        return x
    if torch.is_grad_enabled():
        return torch.tanh(x / cap) * cap
    return x.div_(cap).tanh_().mul_(cap)  # logits are large: no copies of them
