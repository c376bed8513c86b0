"""Low-rank adapters beside frozen linear layers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), and
QLoRA (2305.14314) when the frozen weights are int8 or int4.

    y = (W + scale B A) x     W [N, K] frozen, A [r, K] and B [N, r] learnt, scale = alpha / r or alpha / sqrt(r)
    DoRA                      every row of W + scale B A gets the length m, learnt as well; its own length counts as a
                              constant for gradients (section 4.3)

A frozen quantised matrix is multiplied as what it stands for, in the type of the activations, both ways; the kernels
that quantise activations too are for inference. So the gradient is that of the function that was computed, and
nothing of the size of the matrix outlives a layer.

Dimension letters: N output channels, K input channels, r rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from cabochon.base.errors import UsageError
from cabochon.model.gemma2 import Gemma2
from cabochon.model.kernels.native import LANES
from cabochon.model.linear import Embedding, Linear, PackedWeight, QuantLinear, frozen_product, matrix_shape
from cabochon.model.lora_config import LoraConfig

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "adapted",
    "adapter_parameters",
    "adapters",
    "attach",
    "detach",
    "merge",
    "without_adapters",
]

PIECE = 2**22  # elements of a matrix that are turned into floats at once


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter. The adapter is float32 whatever the layer is.

    Args:
        base: the layer.
        a, b: A [r, K] and B [N, r].
        alpha, rslora: what the scale is made of.
        magnitude: with DoRA the rows' lengths [N], None without.
        dropout: share of the adapter's inputs left out while training.
    """

    def __init__(
        self,
        base: Linear | QuantLinear,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float,
        rslora: bool = False,
        magnitude: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base, self.alpha, self.rslora, self.dropout = base, alpha, rslora, dropout
        self.active = True
        device = base.weight.device
        self.a, self.b = (nn.Parameter(t.to(device, torch.float32, copy=True)) for t in (a, b))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.to(device, torch.float32, copy=True))

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale(self.alpha, self.rank, rslora=self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]. Dropout is for the adapter's inputs alone, with DoRA, too."""
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        if mixed:  # once, not in each product
            x = x.to(torch.get_autocast_dtype(kind))
        out = frozen_product(x, self.base)
        if not self.active:
            return out
        x = dropout(x, self.dropout, self.training)
        low = linear(x if mixed else x.to(self.a.dtype), self.a)
        out = out + linear(low * self.scale, self.b).to(out.dtype)
        if self.magnitude is None:
            return out
        # Near 1: what is added to 1 keeps its precision in bfloat16, the factor would not.
        more = self.magnitude / self._lengths() - 1
        return torch.addcmul(out, out, more.to(out.dtype))

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Of the rows of W + scale B A: [N]; a few MiB of that matrix are there at a time."""
        lengths, done = [], 0
        with torch.autocast(self.a.device.type, enabled=False):
            for rows in float_rows(self.base, self.a.dtype):
                changed = torch.addmm(rows, self.b[done : done + len(rows)], self.a, alpha=self.scale)
                lengths.append(torch.linalg.vector_norm(changed, dim=1))
                done += len(rows)
        return torch.cat(lengths).clamp_min(torch.finfo(self.a.dtype).tiny)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> Tensor:
        """The one matrix [N, K] that does the same, computed in float32 and rounded once."""
        out = torch.empty(len(self.b), self.a.shape[1], dtype=dtype, device=self.a.device)
        done = 0
        for rows in float_rows(self.base):
            part = slice(done, done + len(rows))
            out[part] = adapted(rows, self.a, self.b[part], self.scale, _part(self.magnitude, part))
            done = part.stop
        return out

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rank {self.rank}, scale {self.scale:.4g}" + (", DoRA" if self.magnitude is not None else "")


def scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def adapted(rows: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Rows of an adapted matrix, float32 [n, K].

    Args:
        rows: those of the matrix, float32 [n, K].
        a, b: A [r, K], and these rows of B [n, r].
        scale: of B A.
        magnitude: the lengths that the rows get [n]; None leaves them.
    """
    result = rows.add(b.to(torch.float32) @ a.to(torch.float32), alpha=scale)
    if magnitude is None:
        return result
    length = torch.linalg.vector_norm(result, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return result.mul_((magnitude.to(torch.float32) / length)[:, None])


def attach(model: Gemma2, config: LoraConfig) -> None:
    """Freeze a model and put adapters beside its linear layers, in place. It still computes the same, bit for bit.

    Args:
        model: of float, int8 or int4 weights, on any device.
        config: which layers, and what adapters.

    Raises:
        UsageError: the model has adapters, or weights that nothing can be trained beside.
    """
    draw = torch.Generator().manual_seed(config.seed)
    for name in bases(model):
        if name.rpartition(".")[2] not in config.targets:
            continue
        base: Any = model.get_submodule(name)
        n, k = matrix_shape(base)
        bound = 1 / math.sqrt(k)  # Kaiming's for a linear layer, as torch and PEFT start one
        a = torch.empty(config.rank, k).uniform_(-bound, bound, generator=draw)
        put(
            model,
            name,
            a,
            torch.zeros(n, config.rank),
            alpha=config.alpha,
            rslora=config.rslora,
            magnitude=row_lengths(base) if config.dora else None,
            dropout=config.dropout,
        )
    freeze(model)


def put(model: Gemma2, name: str, a: Tensor, b: Tensor, **settings: Any) -> None:
    """Put an adapter beside one linear layer; arguments as those of `LoraLinear`."""
    base: Any = model.get_submodule(name)
    model.set_submodule(name, LoraLinear(base, a, b, **settings).train(base.training))


def freeze(model: Gemma2) -> None:
    """Leave gradients to the adapters alone. Quantised layers, adapted or not, are then multiplied as floats."""
    learnt = {id(parameter) for parameter in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learnt)
    _set_exact(model, True)


def bases(model: Gemma2) -> list[str]:
    """The names of all linear layers, which can get adapters. Raises `UsageError` when they cannot."""
    found = []
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, LoraLinear):
            raise UsageError(
                "the model has adapters already", f"there is one beside {name}", "merge or detach them first"
            )
        if isinstance(module, Linear | QuantLinear):
            found.append(name)
    if not found:
        raise UsageError(
            "no adapters can be put beside these weights",
            "they are kept in 12 bits, for inference",
            'load the model with weights "bf16", "int8" or "int4"',
        )
    return found


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is learnt, by name: `layers.0.attention.q.a`, `.b` and with DoRA `.magnitude`."""
    return {
        f"{name}.{part}": parameter
        for name, layer in adapters(model).items()
        for part, parameter in layer.named_parameters(recurse=False)
    }


@contextmanager
def without_adapters(model: Gemma2) -> Iterator[None]:
    """Inside the block the model computes what it would without its adapters. Not for passes with gradients."""
    layers = adapters(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def detach(model: Gemma2) -> None:
    """Take the adapters away, in place: the model as it was, with gradients for all its parameters."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.base)
    model.requires_grad_(True)
    _set_exact(model, False)


def _set_exact(model: Gemma2, exact: bool) -> None:
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.exact = exact


def merge(model: Gemma2, dtype: torch.dtype | None = None) -> None:
    """Make the adapters part of the weights, in place: a plain model, with gradients for all its parameters.

    Quantised layers become floats, adapted or not: they are what the adapters were trained beside.

    Args:
        model: one without adapters only loses its quantised layers.
        dtype: of matrices that change; None keeps that of float ones, and takes the embedding's for quantised ones.
    """
    for name, layer in adapters(model).items():
        own = layer.base.weight.dtype if isinstance(layer.base, Linear) else model.cache_dtype
        _replace(model, name, layer.merged(dtype or own))
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedWeight):
            _replace(model, name, module.dequantized(dtype or model.cache_dtype))
    model.requires_grad_(True)


def _replace(model: Gemma2, name: str, values: Tensor) -> None:
    """Put a plain layer with these values [N, K] in the place of another one."""
    with torch.device("meta"):
        plain = Embedding(*values.shape) if name == "embedding" else Linear(values.shape[1], values.shape[0])
    plain.weight = nn.Parameter(values)
    model.set_submodule(name, plain.train(model.training))


def float_rows(base: Linear | QuantLinear, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The rows of the matrix of a linear layer, a few MiB at a time, [n, K]."""
    n, k = matrix_shape(base)
    count = max(1, PIECE // k // LANES) * LANES
    for start in range(0, n, count):
        part = slice(start, start + count)
        yield base.dequantized(dtype, part) if isinstance(base, QuantLinear) else base.weight.detach()[part].to(dtype)


def row_lengths(base: Linear | QuantLinear) -> Tensor:
    """The length of every row of a linear layer's matrix, float32 [N]."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in float_rows(base)])


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]
