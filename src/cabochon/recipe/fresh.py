"""A model with random weights, and a tokenizer of its size: where training from scratch and benchmarks begin."""

import json
from collections.abc import Mapping

import torch

from cabochon.base.errors import UsageError
from cabochon.model.config import Gemma2Config
from cabochon.model.gemma2 import Gemma2


def fresh_model(config: Gemma2Config, *, seed: int, dtype: torch.dtype = torch.bfloat16) -> Gemma2:
    """Seeded weights, made in `dtype` directly so that memory is needed once.

    Matrices are normal with a deviation of 1/sqrt(inputs), the embedding with 0.02; norm weights are zero, which
    is a factor of one.
    """
    with torch.device("meta"):
        model = Gemma2(config)
    model = model.to(dtype).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.zero_()
            else:
                weight.normal_(
                    std=0.02 if name == "embedding.weight" else weight.shape[1] ** -0.5, generator=draw
                )
    return model


def widen_tokenizer(files: Mapping[str, bytes], size: int) -> dict[str, bytes]:
    """Tokenizer files whose `tokenizer.json` has exactly `size` ids.

    The ids that are added are placeholders that no text is ever encoded to. Raises `UsageError` when the
    tokenizer already has more pieces than `size`.
    """
    document = json.loads(files["tokenizer.json"])
    vocabulary: dict[str, int] = document["model"]["vocab"]
    for token in document["added_tokens"]:  # those beside the vocabulary would be numbered anew behind it
        vocabulary.setdefault(token["content"], token["id"])
    used = set(vocabulary.values())
    if max(used) >= size:
        raise UsageError(
            f"a vocabulary of {size} is too small",
            f"the tokenizer that it starts from has {max(used) + 1} pieces",
            f"choose a preset with at least {max(used) + 1} entries",
        )
    vocabulary.update({f"<placeholder-{i}>": i for i in range(size) if i not in used})
    return {**files, "tokenizer.json": json.dumps(document, ensure_ascii=False).encode()}
