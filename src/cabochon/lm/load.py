"""From a folder or a Hub id to a model that answers."""

from pathlib import Path

import torch

from cabochon.base.errors import MissingResource, UsageError
from cabochon.lm.model import LM
from cabochon.text.tokenizer import load_tokenizer
from cabochon.weights.folder import load_model
from cabochon.weights.hub import resolve


def load(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    softcap: bool = True,
) -> LM:
    """Load a model for use.

    Args:
        model: a folder, a Hub id such as "google/gemma-2-9b-it", or None for the model that ships inside.
        dtype: "bfloat16" or "float32"; None keeps what the folder stores.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU when there is one.
        revision, token, offline: for the Hub: a branch, tag or commit; an access token; use only what is here.
        softcap: False leaves the soft cap on attention scores out, which is faster in places and another
            model than the one that was trained: an explicit choice, for inference only.

    Raises:
        BadInput, MissingResource: the folder or the Hub cannot give a whole, sound model.
    """
    folder = resolve(model, revision=revision, token=token, offline=offline)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = load_model(folder, dtype=_dtype(dtype), device=where, softcap=softcap).eval()
    try:
        tokenizer = load_tokenizer(folder)
    except MissingResource:  # only text calls need one
        return LM(net)
    tokenizer.check_fits(net.config.vocab_size)
    return LM(net, tokenizer)


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in known:
        raise UsageError(f"no dtype named {name!r}", "weights are bfloat16 or float32", "use one of these")
    return known[name]
