"""The embeddings of models with different tokenizers, brought to one vocabulary, some rows at a time.

Where a model has a token, the row is its own. Where it lacks one, the row is, as mergekit 0.1.5 documents it: what the
configuration names for the token; else the base's, if the base takes part and has it; else that of the only model that
has it; else the mean over the models that have it; else zeros. Rows that pad the vocabulary are the mean of all others
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html). All work in float32; mergekit fills rows in the type of the
tensors, so that with bfloat16 its means are rounded before they are merged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cabochon.base.errors import BadInput
from cabochon.merge.config import ModelRef
from cabochon.merge.methods.blocks import BLOCK, Whole
from cabochon.merge.rows import whole_of_rows
from cabochon.merge.vocabulary import Fixed, Vocabulary

_ZERO, _MEAN = -1, -2  # in the place of a donor's number


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of the M models that take part in a merge. Made by `embeddings`.

    Attributes:
        tensors: as stored, [rows of that model, D]; usually views of mapped files.
        shape: of each in the output's vocabulary, [V, D].
    """

    tensors: Mapping[ModelRef, Tensor]
    shape: tuple[int, int]
    _own: Tensor  # int64 [M, V]: the row of the model that is its own, or -1
    _present: Tensor  # int64 [M, V]: the same without looking at what is forced
    _donor: Tensor  # int64 [V]: the number of the model that fills the row of one that lacks it
    _row: Tensor  # int64 [V]: which row of the donor
    _used: int  # rows before the padding
    _padding: Tensor  # float32 [M, D]: what pads each model's

    def rows(self, model: ModelRef, start: int, stop: int) -> Tensor:
        """Rows from start up to, without, stop of a model's embedding in the output's vocabulary, float32 [r, D].

        They may be a view of the model's file: never write into them. May be called from several threads.
        """
        number = list(self.tensors).index(model)
        own, stored = self._own[number, start:stop], self.tensors[model]
        if len(own) and own[0] >= 0 and bool((own.diff() == 1).all()):  # they lie together, as they nearly always do
            return stored[int(own[0]) : int(own[-1]) + 1].to(torch.float32)
        out = torch.zeros(len(own), self.shape[1])
        _copy(out, own >= 0, stored, own)
        donor = self._donor[start:stop].masked_fill(own >= 0, _ZERO)
        for other, tensor in enumerate(self.tensors.values()):
            _copy(out, donor == other, tensor, self._row[start:stop])
        averaged = (donor == _MEAN).nonzero().flatten()
        if len(averaged):
            out[averaged] = self._mean(averaged + start)
        if stop > self._used:
            out[max(0, self._used - start) :] = self._padding[number]
        return out

    def whole(
        self,
        models: Sequence[ModelRef],
        base: ModelRef | None = None,
        *,
        run: Callable[..., Iterable[object]] = map,
        block: int = BLOCK,
        names: tuple[str, ...] = (),
    ) -> Whole:
        """The embeddings of some of the models as merge methods take them; the last arguments as for `Whole`."""
        makers = [partial(self.rows, model) for model in models]
        around = None if base is None else partial(self.rows, base)
        return whole_of_rows(self.shape, makers, around, run=run, block=block, names=names)

    def _mean(self, rows: Tensor) -> Tensor:
        """Mean of some rows over the models that have them, float32 [r, D]."""
        total, count = torch.zeros(len(rows), self.shape[1]), torch.zeros(len(rows), 1)
        for places, tensor in zip(self._present[:, rows], self.tensors.values(), strict=True):
            has = places >= 0
            total[has] += tensor[places[has]].to(torch.float32)
            count[has] += 1
        return total / count


def embeddings(vocabulary: Vocabulary, tensors: Mapping[ModelRef, Tensor], base: ModelRef | None = None) -> Embeddings:
    """See the embeddings of models in the output's vocabulary. With padding this reads all of them once.

    Args:
        vocabulary: of the output.
        tensors: the embedding [rows, D] of every model that takes part, the base included if it does.
        base: whose row stands in first where another model lacks a token, if it takes part; None: that of the
            configuration, also for methods to which it is a model like the others.

    Raises `BadInput`: columns differ, a tensor has fewer rows than its tokenizer needs, or a token's source does not
    take part or does not have it.
    """
    _check_shapes(vocabulary, tensors)
    own = torch.stack([vocabulary.permutations[model] for model in tensors])
    present = own.clone()
    count = (present >= 0).sum(0)
    donor = torch.where(count == 1, (present >= 0).int().argmax(0), _MEAN).masked_fill_(count == 0, _ZERO)
    models, base = list(tensors), base or vocabulary.base
    if base is not None and base in tensors:
        number = models.index(base)
        donor.masked_fill_(present[number] >= 0, number)
    row = present.gather(0, donor.clamp(min=0)[None])[0]
    for one in vocabulary.fixed:
        if not one.force and bool((present[:, one.row] >= 0).all()):
            continue  # every model has the token
        donor[one.row], row[one.row] = _source(one, tensors), one.source
        if one.force:
            own[:, one.row] = -1
    columns = next(iter(tensors.values())).shape[1]
    made = Embeddings(
        dict(tensors), (vocabulary.size, columns), own, present, donor, row, vocabulary.used, torch.empty(0)
    )
    if vocabulary.size == vocabulary.used:
        return made
    return replace(made, _padding=torch.stack([_column_means(made, model) for model in tensors]))


def _copy(out: Tensor, where: Tensor, tensor: Tensor, rows: Tensor) -> None:
    """Put rows of a tensor into the rows of `out` that a mask [r] names."""
    if bool(where.any()):
        out[where] = tensor[rows[where]].to(torch.float32)


def _column_means(made: Embeddings, model: ModelRef) -> Tensor:
    """float32 [D], summed in float64."""
    step = max(1, BLOCK // made.shape[1])
    total = torch.zeros(made.shape[1], dtype=torch.float64)
    for start in range(0, made._used, step):
        total += made.rows(model, start, min(start + step, made._used)).sum(0, dtype=torch.float64)
    return (total / made._used).float()


def _check_shapes(vocabulary: Vocabulary, tensors: Mapping[ModelRef, Tensor]) -> None:
    columns = {tensor.shape[1]: str(model) for model, tensor in tensors.items()}
    if len(columns) > 1:
        found = ", ".join(f"{count} in {model}" for count, model in columns.items())
        raise BadInput(
            "embeddings of different widths cannot be merged", f"columns: {found}", "merge models of one size"
        )
    for model, tensor in tensors.items():
        needed = int(vocabulary.permutations[model].max()) + 1
        if len(tensor) < needed:
            raise BadInput(
                f"the tokenizer of {model} does not fit its embedding",
                f"it needs {needed} rows and there are {len(tensor)}",
                "use the tokenizer files that came with the weights",
            )


def _source(one: Fixed, tensors: Mapping[ModelRef, Tensor]) -> int:
    """The number of the model that a token's row comes from."""
    if one.model is None:
        return _ZERO
    if one.model not in tensors or not 0 <= one.source < len(tensors[one.model]):
        cause = "it does not have the token" if one.model in tensors else "it takes no part in merging the embedding"
        raise BadInput(f"{one.token!r} cannot be taken from {one.model}", cause, "name another source for the token")
    return list(tensors).index(one.model)
