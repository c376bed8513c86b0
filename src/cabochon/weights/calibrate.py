"""A model to 4 bits, block by block, each rounded for what reaches it through those that are rounded already.

Only one block is in memory as floats, beside the states of the calibration tokens. In a block the layers are rounded
in the order in which they compute, so that `o` is made for the values that rounded q, k and v give it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cabochon.base.errors import UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2, rotary
from cabochon.model.linear import QuantEmbedding, QuantLinear, fake_quantize, quantize
from cabochon.weights.gptq import gptq, nearest
from cabochon.weights.quantize import Named, filled, named
from cabochon.weights.read import Reader
from cabochon.weights.scheme import Scheme

# Layers of a block that take the same input, in the order in which they compute.
STAGES = (("attention.q", "attention.k", "attention.v"), ("attention.o",), ("mlp.gate", "mlp.up"), ("mlp.down",))


class Tokens(Protocol):
    """Rows of calibration tokens, such as a `Batch`: ids and numbers of documents, both int64 [B, T]."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def documents(self) -> Tensor: ...


@torch.no_grad()
def calibrated(
    reader: Reader, config: Gemma2Config, scheme: Scheme, *, batches: Sequence[Tokens], device: str = "cpu"
) -> Iterator[Named]:
    """Every tensor of the model, its layers rounded to 4 bits by GPTQ and the embedding to the nearest.

    Args:
        batches: what the model is made to work well on, some thousand tokens of the kind that it will meet.
        device: where the blocks compute.

    Raises:
        BadInput: as `Reader` does.
        UsageError: the tokens are not ids of this model.
    """
    _check_ids(config, batches)
    embedding = _embedding(reader, config, scheme)
    yield from named("embedding.weight", embedding)
    with torch.device("meta"):
        model = Gemma2(config)
    model.set_submodule("embedding", embedding.to(device))
    runs = [_Run(model, batch, device) for batch in batches]
    for index, block in enumerate(model.layers):
        block.load_state_dict(_block_values(reader, index, block, device), assign=True)
        for stage in STAGES:
            products = _products(block, stage[0], [run.arguments(config.is_local(index)) for run in runs], scheme.group)
            for layer in stage:
                _round_layer(block, layer, products, scheme)
        for run in runs:
            run.states = block(*run.arguments(config.is_local(index)))
        yield from ((f"layers.{index}.{name}", tensor.cpu()) for name, tensor in block.state_dict().items())
        block.to("meta")
    yield "final_norm.weight", reader.load("final_norm.weight", torch.float32, torch.device("cpu"))


def _embedding(reader: Reader, config: Gemma2Config, scheme: Scheme) -> QuantEmbedding:
    bits, group = scheme.embedding_bits, scheme.group
    pieces = (
        nearest(rows, group) if bits == 4 else quantize(rows, bits, group) for rows in reader.rows("embedding.weight")
    )
    return filled(QuantEmbedding(config.vocab_size, config.hidden_size, bits, group), pieces)


def _block_values(reader: Reader, index: int, block: nn.Module, device: str) -> dict[str, Tensor]:
    where = torch.device(device)
    return {name: reader.load(f"layers.{index}.{name}", torch.float32, where) for name, _ in block.named_parameters()}


def _round_layer(block: nn.Module, layer: str, products: Tensor, scheme: Scheme) -> None:
    """Put a packed layer in the place of a linear one."""
    weight = block.get_parameter(layer + ".weight")
    packed = QuantLinear(weight.shape[0], weight.shape[1], scheme.bits, scheme.group)
    packed.fill(gptq(weight, products, scheme.group))
    block.set_submodule(layer, packed)


class _Enough(Exception):
    """Ends a forward pass early. Never reaches a user."""


def _products(block: nn.Module, layer: str, calls: Iterable[tuple[Any, ...]], group: int) -> Tensor:
    """Sum over all tokens of x x^T, float32 [K, K], for the inputs x of a layer as its kernel will round them."""
    total: Tensor | None = None

    def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal total
        flat = inputs[0].flatten(0, -2)
        x = fake_quantize(pad(flat, (0, -flat.shape[1] % group)), group)[:, : flat.shape[1]]
        total = x.t() @ x if total is None else total.addmm_(x.t(), x)
        raise _Enough

    hook = block.get_submodule(layer).register_forward_pre_hook(add)
    for call in calls:
        with contextlib.suppress(_Enough):
            block(*call)
    hook.remove()
    assert total is not None
    return total


def _check_ids(config: Gemma2Config, batches: Sequence[Tokens]) -> None:
    known = all(0 <= int(end) < config.vocab_size for batch in batches for end in batch.ids.aminmax())
    if not batches or not known:
        raise UsageError(
            "the model cannot be calibrated",
            f"there are no tokens, or some are no ids of a vocabulary of {config.vocab_size}",
            "pass batches that this model's own tokenizer made",
        )


class _Run:
    """Some rows of tokens on their way through the blocks."""

    def __init__(self, model: Gemma2, batch: Tokens, device: str) -> None:
        ids, documents = batch.ids.to(device), batch.documents.to(device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        self.states = model.embed(ids)  # float32 [B, T, D]
        self._rotation = rotary(positions, model.config.head_dim, model.config.rope_theta)
        self._visible = model.visibility(positions, documents)

    def arguments(self, local: bool) -> tuple[Any, ...]:
        """What the next block is called with."""
        return self.states, self._rotation, self._visible[local], None, None
