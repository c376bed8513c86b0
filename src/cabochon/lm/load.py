"""From a folder or a Hub id to a model that answers."""

from pathlib import Path

import torch

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.generate.speculate import DraftModel, PromptLookup, Speculator
from cabochon.lm.model import LM
from cabochon.model.gemma2 import Gemma2
from cabochon.text.tokenizer import Tokenizer, load_tokenizer
from cabochon.weights.adapter_config import CONFIG, read_settings
from cabochon.weights.folder import load_model
from cabochon.weights.hub import adapter_folder, resolve


def load(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    softcap: bool = True,
    check_memory: bool = True,
    speculate: bool = False,
    draft: str | Path | None = None,
) -> LM:
    """Load a model for use.

    Args:
        model: a folder, a Hub id such as "google/gemma-2-9b-it", or None for the model that ships inside. An adapter's
            folder or id, too: the model is then the one that the adapter says it belongs to.
        adapter: LoRA or DoRA in PEFT's format, a folder or a Hub id. It becomes part of the weights before they are
            rounded, so that nothing is slower for it.
        dtype: of float weights: "bfloat16" or "float32"; None keeps what the folder stores.
        weights: "auto" as they are stored, "bf16", "lossless" (bfloat16 in 12 bits each, the same values: faster
            decoding on a CPU), or "int8" and "int4", which round to the nearest while loading.
            Better 4-bit weights, and the fastest loading, come from a folder that `cabochon quantize` wrote.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU when there is one.
        revision, token, offline: for the Hub: a branch, tag or commit; an access token; use only what is here.
        softcap: False leaves the soft cap on attention scores out, which is faster in places and another
            model than the one that was trained: an explicit choice, for inference only.
        check_memory: False tries to load a model that is larger than the free memory.
        speculate: guess tokens from what was said before; worth it where answers repeat their prompts.
        draft: a smaller model over the same tokenizer that guesses tokens, as a folder or a Hub id. Answers stay the
            same either way, only faster or slower.

    Raises:
        UsageError: the stored weights cannot become what was asked for.
        BadInput, MissingResource: the folder or the Hub cannot give a whole, sound model.
    """
    folder, beside = _find(model, adapter, revision, token, offline)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = load_model(
        folder,
        dtype=_dtype(dtype),
        weights=weights,
        device=where,
        softcap=softcap,
        check_memory=check_memory,
        adapter=beside,
    ).eval()
    tokenizer = _tokenizer(folder, net) or (_tokenizer(beside, net) if beside else None)
    speculator: Speculator | None = PromptLookup() if speculate else None
    if draft is not None:
        found = resolve(draft, token=token, offline=offline)
        speculator = DraftModel(load_model(found, weights=weights, device=where, softcap=softcap).eval(), net)
        _check_same_pieces(tokenizer, _tokenizer(found, speculator.model), found)
    return LM(net, tokenizer, speculator=speculator)


def _find(
    model: str | Path | None, adapter: str | Path | None, revision: str | None, token: str | None, offline: bool
) -> tuple[Path, Path | None]:
    """The folders of a model, and of the adapter that goes on it, if any."""
    folder = resolve(model, revision=revision, token=token, offline=offline)
    beside = None if adapter is None else adapter_folder(adapter, token=token, offline=offline)
    if (folder / "config.json").exists() or not (folder / CONFIG).is_file():
        return folder, beside
    if beside:
        raise UsageError(
            f"{adapter} cannot be put on {model}", "both are adapters", "merge them first, or name the base model"
        )
    return _base(folder, token, offline), folder


def _base(adapter: Path, token: str | None, offline: bool) -> Path:
    """The folder of the model that an adapter says it belongs to."""
    name = read_settings(adapter / CONFIG).base_model
    how = f"name its model: --adapter {adapter} MODEL (load(MODEL, adapter={str(adapter)!r}))"
    if not name:
        raise BadInput(f"the adapter in {adapter} has no base", f"its {CONFIG} names none", how)
    what = f"the base of the adapter in {adapter}, {name}, cannot be used"
    try:
        folder = resolve(name, token=token, offline=offline)
    except CabochonError as error:
        raise MissingResource(what, error.cause, f"{error.hint}; or {how}") from None
    if not (folder / "config.json").is_file():
        raise BadInput(what, "it has no config.json", how)
    return folder


def _tokenizer(folder: Path, net: Gemma2) -> Tokenizer | None:
    try:
        tokenizer = load_tokenizer(folder)
    except MissingResource:  # only text calls need one
        return None
    tokenizer.check_fits(net.config.vocab_size)
    return tokenizer


def _check_same_pieces(ours: Tokenizer | None, theirs: Tokenizer | None, folder: Path) -> None:
    if ours and theirs and any(ours.token_bytes(i) != theirs.token_bytes(i) for i in range(ours.vocab_size)):
        raise UsageError(
            f"{folder} cannot guess for this model",
            "its tokenizer has other pieces under the same numbers",
            "choose a smaller model with the same tokenizer",
        )


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in known:
        raise UsageError(f"no dtype named {name!r}", "weights are bfloat16 or float32", "use one of these")
    return known[name]
