"""From float weights to 8 or 4 bits, tensor by tensor: on the way into memory, or into a folder of their own.

    rounded     each matrix to the nearest values
    calibrated  in calibrate.py: each layer so that its outputs on given tokens change least

Both give the tensors of a model one after the other, in the order of `layout`, so that no more than a few are in
memory as floats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cabochon.base.errors import UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.kernels.native import LANES
from cabochon.model.linear import PackedWeight, QuantEmbedding, Quantized, QuantLinear, quantize
from cabochon.model.lossless import LosslessEmbedding, LosslessLinear, high_bytes
from cabochon.weights.names import shapes, to_hf
from cabochon.weights.read import PIECE, TORCH, Reader
from cabochon.weights.save import SHARD_BYTES, Entry, write_folder
from cabochon.weights.scheme import Packed, Scheme, layout
from cabochon.weights.verify import verify

LOSSLESS_ROWS = 4096  # packed at a time
Named = tuple[str, Tensor]
P = TypeVar("P", bound=PackedWeight)


def use_packed_layers(model: nn.Module, scheme: Scheme) -> None:
    """Put packed layers, still without values, in the place of all linear layers and the embedding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            kind = QuantLinear if isinstance(module, nn.Linear) else QuantEmbedding
            rows, columns = module.weight.shape
            packed = kind(rows, columns, scheme.bits_of(name), scheme.group)
            packed.method = scheme.method
            model.set_submodule(name, packed)


def quantize_layers(model: nn.Module, bits: int, group: int = 0, *, embedding: bool = False) -> None:
    """Round the linear layers of a float model to 8 or 4 bits, in place, one after the other.

    The embedding, which is also the head, stays as it is unless `embedding`: adapters are trained beside weights like
    these (QLoRA, arXiv 2305.14314). Norms always stay. Raises `UsageError` for numbers that there are no kernels for.

    Args:
        model: on any device. A quantised layer is left alone.
        bits: 8 or 4.
        group: input channels that share a scale; 0: 128 for 8 bits, 64 for 4.
    """
    scheme = Scheme(bits, group)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or (embedding and isinstance(module, nn.Embedding)):
            rows, columns = module.weight.shape
            kind = QuantLinear if isinstance(module, nn.Linear) else QuantEmbedding
            with torch.no_grad(), module.weight.device:
                pieces = module.weight.split(max(1, PIECE // columns // LANES) * LANES)
                packed = filled(
                    kind(rows, columns, bits, scheme.group), (quantize(p, bits, scheme.group) for p in pieces)
                )
            model.set_submodule(name, packed.train(module.training))


def use_lossless_layers(model: nn.Module, reader: Reader) -> None:
    """Put the matrices of a bfloat16 folder, in 12 bits, in the place of all linear layers and the embedding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            kind = LosslessLinear if isinstance(module, nn.Linear) else LosslessEmbedding
            values = reader.load(f"{name}.weight", torch.bfloat16, torch.device("cpu"))
            packed = kind(*values.shape)
            packed.fill(values.split(LOSSLESS_ROWS), high_bytes(values))
            model.set_submodule(name, packed)
            reader.let_go(f"{name}.weight")
            reader.let_go(f"{name}.weight")


def rounded(reader: Reader, config: Gemma2Config, scheme: Scheme) -> Iterator[Named]:
    """Every tensor of the model, its matrices rounded to the nearest. Raises `BadInput` as `Reader` does."""
    for name, shape in shapes(config):
        if len(shape) == 1:
            yield name, reader.load(name, torch.float32, torch.device("cpu"))
        else:
            bits = scheme.bits_of(name)
            matrix = PackedWeight(shape[0], shape[1], bits, scheme.group)
            yield from named(name, filled(matrix, (quantize(rows, bits, scheme.group) for rows in reader.rows(name))))


def filled(whole: P, pieces: Iterable[Quantized]) -> P:
    """A packed matrix with values from pieces of its rows, each but the last a multiple of `LANES` rows."""
    done = 0
    for piece in pieces:
        part = PackedWeight(len(piece.q), whole.columns, whole.bits, whole.group)
        part.fill(piece)
        end = done + len(part.weight)
        for name, values in part.named_buffers():
            whole.get_buffer(name)[done:end] = values
        done = end
    assert done == len(whole.weight)
    return whole


def named(name: str, matrix: PackedWeight) -> Iterator[Named]:
    """The tensors of a packed matrix under the names that a model has for them; `name` is the weight's."""
    return ((name.removesuffix("weight") + buffer, values) for buffer, values in matrix.named_buffers())


def quantize_folder(
    source: Path,
    target: Path,
    scheme: Scheme,
    *,
    tensors: Callable[[Reader, Gemma2Config, Scheme], Iterator[Named]] = rounded,
    tokenizer_files: Mapping[str, bytes] | None = None,
    report: Callable[[int], None] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of quantised weights, which loads by mapping its files; whole or not at all.

    Args:
        source: a model folder with float weights.
        target: new or empty, unless `overwrite`.
        tensors: where the values come from: `rounded`, or what `calibrated` in calibrate.py makes.
        tokenizer_files: file name to content, written unchanged beside the weights.
        report: called with the bytes of each tensor that is done; together `scheme.nbytes(config)`.
        shard_bytes: the most bytes of weights in one file (a single tensor may be larger).

    Raises:
        UsageError: the folder is quantised already, or the target is in use.
        BadInput: the source is not a sound model.
        MissingResource: no space or no permission. Nothing is left behind.
    """
    checked = verify(source)
    if checked.scheme:
        raise UsageError(
            f"{source} cannot be quantised",
            f"its weights are quantised already: {checked.scheme}",
            "quantise the float model that it was made from",
        )
    reader = Reader(checked)
    reader.check_tied_head()
    stream = tensors(reader, checked.config, scheme)

    def values(expected: Packed) -> Iterator[Tensor]:
        name, tensor = next(stream)
        assert (name, tensor.shape) == (expected.name, expected.shape), name
        yield tensor
        report(expected.nbytes)

    entries = [
        Entry(to_hf(t.name), t.shape, partial(values, t), TORCH[t.dtype]) for t in layout(checked.config, scheme)
    ]
    write_folder(
        target,
        checked.config,
        entries,
        dtype=torch.float32,  # of everything that is not quantised
        scheme=scheme,
        tokenizer_files=tokenizer_files,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
