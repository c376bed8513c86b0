"""The output head over chunks of tokens: log-probabilities without the logits of a whole batch.

8192 tokens against 256,000 entries are 7.8 GiB of float32 logits; a chunk of 256 tokens is 250 MiB, and it is
freed before the next is made. Dimension letters: M tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK_BYTES = 256 * 2**20

Head = Callable[[Tensor], Tensor]  # hidden [M, D] -> soft-capped logits float32 [M, V], as Gemma2.head


def token_losses(head: Head, hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Negative log-probability float32 [M] of targets int64 [M] after hidden [M, D]; 0 where the target is -100.

    For looking at: with gradients on, the logits of all chunks would be kept. Training has `train/losses`.
    """

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(part), wanted, reduction="none", ignore_index=-100)

    size = chunk_size(vocab_size)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([losses(*part) for part in parts])


def logit_chunks(head: Head, hidden: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """The logits float32 [<= chunk, V] of hidden [M, D], chunk after chunk."""
    return (head(part) for part in hidden.split(chunk_size(vocab_size)))


def chunk_size(vocab_size: int) -> int:
    """Tokens whose float32 logits fit `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))
