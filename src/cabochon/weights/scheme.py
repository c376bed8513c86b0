"""How a folder stores its matrices in 8 or 4 bits: what `config.json` says about it, and the tensors that follow.

The layout of the bytes is that of the kernels (`model/linear.py`), so such a folder is used as it is mapped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.base.errors import BadInput, UsageError
from cabochon.model.config import Gemma2Config
from cabochon.weights.names import shapes

KEY, NAME, FORMAT = "quantization_config", "cabochon", 1
BITSANDBYTES = "bitsandbytes"  # whose folders are read as float weights (bnb.py)
BITS, GROUPS, METHODS = (8, 4), (32, 64, 128), ("rtn", "gptq")
USUAL_GROUP = {8: 128, 4: 64}  # long ones are faster; in 4 bits it is also what shares a scale
TILE = 16  # output channels that lie together


@dataclass(frozen=True)
class Scheme:
    """Bits of a weight, input channels that share a scale, and how the weights were rounded.

    The embedding, which is also the head, may keep 8 bits beside layers of 4. Raises `UsageError` for numbers that
    there are no kernels for.
    """

    bits: int
    group: int = 0  # 0: the usual number for these bits
    method: str = "rtn"
    embedding_bits: int = 0  # 0: as many as the layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or USUAL_GROUP.get(self.bits))
        object.__setattr__(self, "embedding_bits", self.embedding_bits or self.bits)
        fields = (("bits", BITS), ("embedding_bits", BITS), ("group", GROUPS), ("method", METHODS))
        for name, allowed in fields:
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                choices = f"the choices are {', '.join(str(choice) for choice in allowed)}"
                raise UsageError(f"weights cannot be quantised with {name} {value!r}", choices, "use one of these")
        if self.bits > self.embedding_bits:
            raise UsageError("the embedding cannot have 4 bits beside 8", "it needs them most", "give it 8 bits")
        if self.bits == 8 and self.method == "gptq":
            raise UsageError(
                "8-bit weights are not calibrated", "rounded to the nearest they answer the same", "use method rtn"
            )

    def __str__(self) -> str:
        embedding = "" if self.embedding_bits == self.bits else f" (embedding {self.embedding_bits})"
        return f"{self.bits} bits{embedding}, groups of {self.group}, {self.method}"

    def bits_of(self, name: str) -> int:
        """Bits of a matrix, by our name."""
        return self.embedding_bits if name.startswith("embedding") else self.bits

    def to_hf(self) -> dict[str, Any]:
        """What `config.json` holds under `quantization_config`."""
        return {
            "quant_method": NAME,
            "format": FORMAT,
            "bits": self.bits,
            "embedding_bits": self.embedding_bits,
            "group_size": self.group,
            "method": self.method,
        }

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Scheme":
        """The same the other way round. Raises `BadInput` for anything that this version does not write."""
        values: list[Any] = [raw.get(name) for name in ("bits", "group_size", "method", "embedding_bits")]
        if not all(isinstance(value, int | str) for value in values):
            raise _unusable(f"it is {dict(raw)!r}, not what `cabochon quantize` writes")
        try:
            scheme = cls(*values)
        except UsageError as error:
            raise _unusable(error.what) from None
        if dict(raw) != scheme.to_hf():
            raise _unusable(f"it is {dict(raw)!r}; format {FORMAT} would be {scheme.to_hf()!r}")
        return scheme

    def nbytes(self, config: Gemma2Config) -> int:
        """Bytes of a whole model, on the disk and in memory."""
        return sum(tensor.nbytes for tensor in layout(config, self))


@dataclass(frozen=True)
class Packed:
    """A tensor of a quantised model by our name; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        count = 1
        for size in self.shape:
            count *= size
        return count * {"U8": 1, "F16": 2, "F32": 4}[self.dtype]


def layout(config: Gemma2Config, scheme: Scheme) -> Iterator[Packed]:
    """Every tensor of a quantised model, in the order in which a pass through the model meets them."""
    for name, shape in shapes(config):
        if len(shape) == 2:
            yield from _matrix(name, *shape, scheme)
        else:
            yield Packed(name, "F32", shape)


def _matrix(name: str, rows: int, columns: int, scheme: Scheme) -> Iterator[Packed]:
    """The tensors that `PackedWeight` in model/linear.py has for a matrix [rows, columns]."""
    tiles, groups = -(-rows // TILE), -(-columns // scheme.group)
    module = name.removesuffix("weight")
    bits = scheme.bits_of(name)
    yield Packed(name, "U8", (tiles, TILE * groups * scheme.group * bits // 8))
    if bits == 8:
        yield Packed(module + "scale", "F32", (tiles, TILE))
    else:
        yield Packed(module + "scale", "F16", (tiles, groups, TILE))
        yield Packed(module + "zero", "U8", (tiles, groups, TILE))


def read_scheme(raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a `config.json`; None for weights that are read as floats.

    Raises `BadInput` for a format of another program than bitsandbytes.
    """
    found = raw.get(KEY)
    if found is None or is_bitsandbytes(raw):
        return None
    if not isinstance(found, Mapping):
        raise _unusable(f"it is {found!r}, not an object")
    if found.get("quant_method") != NAME:
        raise BadInput(
            f"weights quantised with {found.get('quant_method')!r} cannot be used",
            f"only float weights, those that `cabochon quantize` wrote and those of {BITSANDBYTES} are read",
            "use the model in bfloat16; --weights int8 or int4 quantises it while loading",
        )
    return Scheme.from_hf(found)


def is_bitsandbytes(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that bitsandbytes has quantised the weights."""
    found = raw.get(KEY)
    return isinstance(found, Mapping) and found.get("quant_method") == BITSANDBYTES


def _unusable(cause: str) -> BadInput:
    return BadInput(
        f"the {KEY} in config.json cannot be used", cause, "quantise the model again with `cabochon quantize`"
    )
