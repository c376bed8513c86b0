"""The vocabulary of a merge: one tokenizer for the output, and for every model where its tokens stand in it.

    read_tokenizers(folders) -> align(tokenizers, choice, base) -> Vocabulary -> embeddings.py, for the tensors

As mergekit 0.1.5 does it, from its documentation and its source: "base" and a model's path take that model's
tokenizer; "union" adds to the base's tokenizer what other models have beyond it, as added tokens; tokens that the
configuration names and the tokenizer lacks are added last. Departures: what mergekit takes in an order that changes
from run to run (tokens of one model, models) is taken in the order of ids and of the file; a token whose id lies
beyond its model's embedding counts as one that the model lacks, where mergekit fails.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.merge.config import ModelRef, TokenChoice, TokenizerChoice
from cabochon.text.backends import open_json, open_sentencepiece
from cabochon.text.tokenizer import FILES
from cabochon.weights.header import parse_json

JSON, PIECES = "tokenizer.json", "tokenizer.model"
_CONFIG, _DECODER = "tokenizer_config.json", "added_tokens_decoder"
_OUTDATED = (PIECES, "added_tokens.json")  # say nothing true once tokens were added or left out
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of one model. Made by `read_tokenizers`.

    Attributes:
        folder: where it is.
        rows: of the model's embedding.
        ids: every token and its id.
        files: its files, by name.
        borrowed: the model has none; this is the base's.
    """

    folder: Path
    rows: int
    ids: Mapping[str, int]
    files: Mapping[str, bytes]
    borrowed: bool = False

    @cached_property
    def usable(self) -> dict[str, int]:
        """The tokens that the model has an embedding for, in the order of their ids."""
        return {token: i for token, i in sorted(self.ids.items(), key=lambda item: item[1]) if i < self.rows}

    @cached_property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens that the model has an embedding for, as tokenizer.json has them, in the order of ids."""
        entries = self.document().get("added_tokens") or []
        return sorted((e for e in entries if e["id"] < self.rows), key=lambda entry: int(entry["id"]))

    def document(self) -> dict[str, Any]:
        """What tokenizer.json says. Raises `BadInput` when there is none."""
        if JSON not in self.files:
            raise BadInput(
                f"the tokenizer in {self.folder} cannot be merged",
                f"it has no {JSON}, and tokens cannot be added to {PIECES}",
                "save it with transformers, which writes tokenizer.json, or use tokenizer_source: base",
            )
        return parse_json(self.files[JSON], self.folder / JSON)


@dataclass(frozen=True)
class Fixed:
    """A row of the output whose embedding the configuration chooses: row `source` of a model; zeros without a model.

    `force`: also for models that have the token. A `source` of -1: the model does not have what was asked for.
    """

    token: str
    row: int
    model: ModelRef | None
    source: int
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokenizer and how the models' embeddings fit into it. Made by `align`.

    Attributes:
        files: the output's tokenizer files, by name.
        tokens: every token of the output and its id.
        used: rows that tokens need: the largest id and one.
        size: rows of the output's embedding: `used`, padded to the multiple that was asked for.
        permutations: for every model int64 [size], row of the output to row of the model's embedding, or -1.
        fixed: rows for which the configuration names a source.
        base: the base model of the configuration, whose rows stand in first where a model lacks a token.
        unchanged: every model's embedding fits as it is; there is nothing to do.
        notes: for the user to read; nothing is wrong with them.
    """

    files: Mapping[str, bytes]
    tokens: Mapping[str, int]
    used: int
    size: int
    permutations: Mapping[ModelRef, Tensor]
    fixed: tuple[Fixed, ...]
    base: ModelRef | None
    unchanged: bool
    notes: tuple[str, ...] = ()


def read_tokenizers(
    folders: Mapping[ModelRef, tuple[Path, int]], base: ModelRef | None = None
) -> dict[ModelRef, ModelTokenizer]:
    """The tokenizers of models, the base's first. Equal files are read once.

    Args:
        folders: of each model, and the rows of its embedding.
        base: whose tokenizer a model without one is taken to have; None: the first.

    Raises `BadInput` and `MissingResource`: a file is damaged, or the base has none.
    """
    first = base or next(iter(folders))
    known: dict[str, Mapping[str, int]] = {}
    found: dict[ModelRef, ModelTokenizer] = {}
    for ref in dict.fromkeys((first, *folders)):
        folder, rows = folders[ref]
        name = next((name for name in (JSON, PIECES) if (folder / name).is_file()), None)
        if name is None and ref != first:
            found[ref] = ModelTokenizer(folder, rows, found[first].ids, found[first].files, borrowed=True)
            continue
        name = name or JSON  # missing: `open_json` says so
        files = tokenizer_files(folder)
        digest = hashlib.sha256(files.get(name, b"")).hexdigest()
        if digest not in known:
            known[digest] = (open_json if name == JSON else open_sentencepiece)(folder / name).ids
        found[ref] = ModelTokenizer(folder, rows, known[digest], files)
    return found


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer as they are, by name. Raises `MissingResource` when one cannot be read."""
    try:
        return {path.name: path.read_bytes() for path in (folder / name for name in FILES) if path.is_file()}
    except OSError as error:
        raise MissingResource(
            f"the tokenizer files in {folder} cannot be read", error.strerror or str(error), "check their permissions"
        ) from None


def align(
    tokenizers: Mapping[ModelRef, ModelTokenizer], choice: TokenizerChoice, base: ModelRef | None = None
) -> Vocabulary:
    """Make the output's tokenizer, and find every model's tokens in it.

    Args:
        tokenizers: of all models that are merged, and of the one that `choice.source` names.
        choice: what the configuration says.
        base: its base model; None: the first model's tokenizer is the base's.

    Raises `BadInput`: a model that is not there, or a tokenizer that nothing can be added to.
    """
    first = base or next(iter(tokenizers))
    source = first if isinstance(choice.source, str) else choice.source
    for ref in (source, *(c.model for c in choice.tokens.values() if isinstance(c, TokenChoice) and c.model)):
        if ref not in tokenizers:
            raise BadInput(f"there is no tokenizer of {ref}", "it is not a model of this merge", "name one that is")
    notes = [
        f"{ref} has no tokenizer and is taken to have that of {first}" for ref in tokenizers if tokenizers[ref].borrowed
    ]
    chosen, extra = tokenizers[source], []
    if choice.source == "union":
        extra = _beyond(chosen, [tokenizers[ref] for ref in dict.fromkeys((first, *tokenizers))], notes)
    missing = [t for t in choice.tokens if t not in chosen.usable and t not in {e["content"] for e in extra}]
    files, ids = _extended(chosen, [*extra, *map(_plain, missing)])
    used = 1 + max(ids.values())
    size = -(-used // (choice.pad_to_multiple_of or 1)) * (choice.pad_to_multiple_of or 1)
    permutations = _permutations(tokenizers, ids, size)
    fixed = tuple(_fixed(t, ids[t], c, tokenizers, permutations) for t, c in choice.tokens.items() if c is not False)
    plain = torch.arange(size)
    unchanged = not any(one.force for one in fixed) and all(
        tokenizers[ref].rows == size and torch.equal(rows, plain) for ref, rows in permutations.items()
    )
    nowhere = int((torch.stack(list(permutations.values()))[:, :used] < 0).all(0).sum())
    nowhere -= sum(one.model is not None for one in fixed if _in_no_model(one, permutations))
    if nowhere:
        notes.append(f"{nowhere} rows of the output's embedding have no source in any model: they are zeros")
    return Vocabulary(files, ids, used, size, permutations, fixed, base, unchanged, tuple(notes))


def _in_no_model(one: Fixed, permutations: Mapping[ModelRef, Tensor]) -> bool:
    return all(rows[one.row] < 0 for rows in permutations.values())


# The output's tokenizer


def _plain(token: str) -> dict[str, Any]:
    """A token as the tokenizers library adds one of which only the text is known."""
    return {"content": token, **dict.fromkeys(_FLAGS, False), "normalized": True}


def _beyond(base: ModelTokenizer, all_: Iterable[ModelTokenizer], notes: list[str]) -> list[dict[str, Any]]:
    """What has to be added to the base's tokenizer for a union: ordinary tokens first, then added ones."""
    ordinary: dict[str, dict[str, Any]] = {}
    added: dict[str, dict[str, Any]] = {}
    for tokenizer in {(id(t.ids), t.rows): t for t in all_}.values():
        own = {entry["content"]: entry for entry in tokenizer.added}
        ordinary |= {t: _plain(t) for t in tokenizer.usable if t not in own and t not in ordinary}
        for token, entry in own.items():
            first = added.setdefault(token, entry)
            if any(first[flag] != entry[flag] for flag in _FLAGS):
                notes.append(f"{token!r} is added with different settings by different models; the first counts")
    known = base.usable
    return [e for t, e in ordinary.items() if t not in known and t not in added] + list(added.values())


def _extended(chosen: ModelTokenizer, extra: list[dict[str, Any]]) -> tuple[dict[str, bytes], dict[str, int]]:
    """A tokenizer's files and ids without the tokens that have no embedding and with others added.

    The files stay byte for byte as they are when that changes nothing.
    """
    usable = chosen.usable
    already = {e["content"] for e in chosen.added} if extra else set()
    extra = [entry for entry in extra if entry["content"] not in already]
    if not extra and len(usable) == len(chosen.ids):
        return dict(chosen.files), dict(usable)
    from tokenizers import AddedToken, Tokenizer

    document = chosen.document()
    if len(usable) < len(chosen.ids):
        _strip(document, chosen)
    library = Tokenizer.from_str(json.dumps(document))
    library.add_tokens([AddedToken(e["content"], **{flag: e[flag] for flag in _FLAGS}) for e in extra])
    files = {name: content for name, content in chosen.files.items() if name not in _OUTDATED}
    files[JSON] = library.to_str(pretty=True).encode()
    config = parse_json(files[_CONFIG], chosen.folder / _CONFIG) if _CONFIG in files else {}
    if _DECODER in config:
        entries = json.loads(files[JSON])["added_tokens"]
        config[_DECODER] = {str(e["id"]): {k: e[k] for k in ("content", *_FLAGS)} for e in entries}
        files[_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    ids = library.get_vocab(with_added_tokens=True)
    return files, dict(sorted(ids.items(), key=lambda item: item[1]))


def _strip(document: dict[str, Any], chosen: ModelTokenizer) -> None:
    """Take the tokens that the model has no embedding for out of a tokenizer.json."""
    model = document["model"]
    if model.get("type") != "BPE":
        raise BadInput(
            f"the tokenizer in {chosen.folder} cannot be merged",
            f"it has ids beyond the {chosen.rows} rows of the embedding, and is {model.get('type')} and not BPE",
            "use the tokenizer files that came with the weights",
        )
    unused = {token for token, i in chosen.ids.items() if i >= chosen.rows}
    document["added_tokens"] = chosen.added
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in unused}
    pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
    model["merges"] = [m for m, pair in pairs if unused.isdisjoint((*pair, "".join(pair)))]


# Where the models' tokens are


def _permutations(
    tokenizers: Mapping[ModelRef, ModelTokenizer], ids: Mapping[str, int], size: int
) -> dict[ModelRef, Tensor]:
    """For every model int64 [size]; models with the same tokenizer share one tensor."""
    made: dict[tuple[int, int], Tensor] = {}
    for tokenizer in tokenizers.values():
        key = (id(tokenizer.ids), tokenizer.rows)
        if key not in made:
            own = tokenizer.ids
            places = [
                (row, own[token]) for token, row in ids.items() if own.get(token, tokenizer.rows) < tokenizer.rows
            ]
            made[key] = torch.full((size,), -1)
            if places:
                rows, sources = torch.tensor(places).T
                made[key][rows] = sources
    return {ref: made[id(tokenizer.ids), tokenizer.rows] for ref, tokenizer in tokenizers.items()}


def _fixed(
    token: str,
    row: int,
    choice: TokenChoice | bool,
    tokenizers: Mapping[ModelRef, ModelTokenizer],
    permutations: Mapping[ModelRef, Tensor],
) -> Fixed:
    if isinstance(choice, bool):
        raise BadInput(
            f"{token!r} has force and no source", "it is not said what to force", "add source, or drop force"
        )
    if choice.model is None:
        return Fixed(token, row, None, -1, choice.force)
    if choice.token is not None:
        source = tokenizers[choice.model].ids.get(choice.token, -1)
    elif choice.token_id is not None:
        source = choice.token_id
    else:
        source = int(permutations[choice.model][row])
    return Fixed(token, row, choice.model, source if source < tokenizers[choice.model].rows else -1, choice.force)
