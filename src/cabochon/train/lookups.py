"""The gradient of looked-up embeddings, added to that of the head where it lies.

Both share one matrix. autograd would make a second one of its size, nearly all zeros, only to add the two: with 256,000
ids that is the most memory of a small model's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cabochon.model.gemma2 import Gemma2
from cabochon.model.linear import Embedding


@contextmanager
def lookups_in_place(model: Gemma2) -> Iterator[None]:
    """A forward and a backward pass go inside; at its end the embedding's gradient is that of autograd.

    Without effect on a GPU, where rows would be added in any order, and on weights that are frozen, packed or sharded.
    """
    embedding = model.embedding
    weight = embedding.weight
    if not isinstance(embedding, Embedding) or type(weight) is not torch.nn.Parameter or weight.device.type != "cpu":
        yield
        return
    embedding.looked_up = [] if weight.requires_grad else None
    try:
        yield
        for ids, rows in embedding.looked_up or ():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, ids, rows.to(weight.dtype))
    finally:
        embedding.looked_up = None
