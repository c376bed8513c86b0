"""The shape of a Gemma 2 model, its published sizes, and the mapping to Hugging Face's `config.json`.

Standard library only: command-line help and error paths read it without loading torch.
Sources: arXiv 2408.00118, table 1; the published `config.json` of each size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cabochon.base.errors import BadInput, UsageError, nearest


@dataclass(frozen=True, kw_only=True)
class Gemma2Config:
    """Every number that fixes a Gemma 2 model. Raises `BadInput` when they cannot form a model."""

    vocab_size: int = 256_000
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # per branch of the gated feed-forward; the report prints twice this
    query_pre_attn_scalar: float  # scores are divided by its square root; 27b: hidden/heads, not head_dim
    sliding_window: int = 4096  # keys that a local layer sees, the query's own position included
    max_position: int = 8192
    attn_softcap: float | None = 50.0
    final_softcap: float | None = 30.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)
    bos_id: int = 2

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int and f.name[-3:] != "_id"}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _impossible(f"{name} is {value!r}", "it has to be a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise _impossible(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly",
                "num_heads has to be a multiple of num_kv_heads",
            )
        if self.head_dim % 2:
            raise _impossible(f"head_dim is {self.head_dim}", "rotary embeddings turn pairs: use an even number")
        for name in ("query_pre_attn_scalar", "attn_softcap", "final_softcap", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            off = value is None and name.endswith("softcap")
            if not off and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise _impossible(f"{name} is {value!r}", "it has to be a positive, finite number")
        for token in (self.pad_id, self.bos_id, *self.eos_ids):
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise _impossible(f"control token {token!r} is outside the vocabulary", "give ids below vocab_size")

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    def is_local(self, layer: int) -> bool:
        """Whether a layer (counted from 0) sees only the window: the even ones do."""
        return layer % 2 == 0

    def window(self, layer: int) -> int | None:
        """Keys that a layer sees, or None for all of them."""
        return self.sliding_window if self.is_local(layer) else None

    @property
    def num_parameters(self) -> int:
        """Stored parameters; the output head shares the embedding's."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        block = attention + 3 * self.hidden_size * self.intermediate_size + 4 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_layers * block + self.hidden_size

    def cache_bytes(self, length: int, element_bytes: int = 2) -> int:
        """Bytes of keys and values of one row of `length` positions: local layers hold one window at most."""
        held = sum(min(length, self.window(layer) or length) for layer in range(self.num_layers))
        return held * 2 * self.num_kv_heads * self.head_dim * element_bytes

    @classmethod
    def preset(cls, name: str) -> "Gemma2Config":
        """The published size `2b`, `9b` or `27b`, or `tiny`, the model that ships inside the package."""
        if name not in PRESETS:
            close = nearest(name, PRESETS)
            raise UsageError(
                f"no preset named {name!r}",
                f"the presets are {', '.join(PRESETS)}",
                f"did you mean {close!r}?" if close else "choose one of these names",
            )
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Gemma2Config":
        """Read the dictionary of a Hugging Face `config.json`. Raises `BadInput` for another architecture."""
        kind = raw.get("model_type")
        if kind != "gemma2":
            raise BadInput(
                f"not a Gemma 2 model: config.json says model_type {kind!r}",
                "only the Gemma 2 architecture is implemented here",
                'use a folder whose config.json has "model_type": "gemma2"',
            )
        missing = [theirs for theirs in _REQUIRED_HF if raw.get(theirs) is None]
        if missing:
            raise _impossible(f"config.json lacks {', '.join(missing)}", "take the file from the published model")
        _refuse_variants(raw)
        values: dict[str, Any] = {ours: raw[theirs] for ours, theirs in _HF_NAMES.items() if theirs in raw}
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise _impossible(f"rope_parameters is {rope!r}", "it has to be an object")
        if "rope_theta" in rope:  # transformers 5 moved it here
            values["rope_theta"] = rope["rope_theta"]
        eos = raw.get("eos_token_id", 1)
        values["eos_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(**{name: value for name, value in values.items() if value is not None or "softcap" in name})

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a `config.json` that transformers 4 and 5 both read."""
        ours = asdict(self)
        eos = list(self.eos_ids)
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **{theirs: ours[name] for name, theirs in _HF_NAMES.items()},
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "layer_types": _layer_types(self.num_layers),
            **_FIXED_HF,
        }

    def with_vocabulary(self, size: int) -> "Gemma2Config":
        """The same model over a vocabulary of another size."""
        return replace(self, vocab_size=size)


PRESETS: dict[str, dict[str, Any]] = {
    "2b": dict(hidden_size=2304, num_layers=26, num_heads=8, num_kv_heads=4, head_dim=256,
               intermediate_size=9216, query_pre_attn_scalar=256),
    "9b": dict(hidden_size=3584, num_layers=42, num_heads=16, num_kv_heads=8, head_dim=256,
               intermediate_size=14_336, query_pre_attn_scalar=256),
    "27b": dict(hidden_size=4608, num_layers=46, num_heads=32, num_kv_heads=16, head_dim=128,
                intermediate_size=36_864, query_pre_attn_scalar=144),
    # Every trap of the larger ones in 7 MB: a window shorter than the context, a head size that is not
    # hidden/heads, a query scale that is not the head size, an embedding scale that bf16 must round.
    "tiny": dict(vocab_size=4096, hidden_size=192, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=64,
                 intermediate_size=512, query_pre_attn_scalar=48, sliding_window=128, max_position=1024,
                 eos_ids=(1, 107)),
}  # fmt: skip

_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
    "max_position": "max_position_embeddings",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
}
_REQUIRED_HF = tuple(
    _HF_NAMES[f] for f in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                           "intermediate_size", "query_pre_attn_scalar")
)  # fmt: skip
_FIXED_HF: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def _layer_types(num_layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]


def _refuse_variants(raw: Mapping[str, Any]) -> None:
    """Settings that would make it another architecture are errors, never ignored."""
    expected = dict(_FIXED_HF)
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):  # its own length, so that an absurd number of layers costs nothing here
        expected["layer_types"] = _layer_types(len(kinds))
    for key, value in expected.items():
        if raw.get(key) not in (None, value):
            raise _impossible(f"config.json sets {key} to {raw[key]!r}", f"Gemma 2 has {value!r} there")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "default"
    if kind != "default":
        raise _impossible(f"config.json scales rotary embeddings ({kind!r})", "Gemma 2 does not scale them")


def _impossible(what: str, hint: str) -> BadInput:
    return BadInput("this configuration is not a Gemma 2 model", what, hint)
