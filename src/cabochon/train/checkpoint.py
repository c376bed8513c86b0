"""Checkpoints: a model folder with what a run needs to go on beside it. Only safetensors and JSON.

    OUT/checkpoints/000400/   config.json, model.safetensors, tokenizer files: a model like any other, in float32
                              (or adapter_config.json and adapter_model.safetensors, when an adapter is trained)
                              optimizer.safetensors, average.safetensors, random.safetensors
                              training.json: step, settings, place in the data, and the SHA-256 of every file

A checkpoint is written under a hidden name, forced to the disk and renamed: it is there whole or not at all. On the way
back every hash is checked, and a checkpoint that is not whole is passed over for the one before it. With several ranks
the first one writes what all have; or each writes its own part (`background.py`). Any number of them goes on from both.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.files import atomic_folder, remove_left_behind, sha256
from cabochon.train.optim import remember, remembered, trainable
from cabochon.train.parts import Parts
from cabochon.train.ranks import SINGLE, Ranks
from cabochon.train.shards import put
from cabochon.train.step import Trainer
from cabochon.train.whole import Whole, writing
from cabochon.weights.save import Entry, flat_pieces, write_safetensors

FOLDER, FACTS = "checkpoints", "training.json"
FORMAT = 1  # of training.json
_OPTIMIZER, _AVERAGE, RANDOM = "optimizer.safetensors", "average.safetensors", "random.safetensors"
PARTS = "parts"  # in training.json: how many files there are of each tensor


@dataclass(frozen=True)
class Weights:
    """How the trained weights go to a folder and come back: those of a whole model, or of an adapter.

    `save` is called by the first process and asks for parameters by name; `load` by all, each of which takes its part.
    """

    save: Callable[[Path, Whole], None]
    load: Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: where it is, the steps done, and what training.json says."""

    folder: Path
    step: int
    facts: dict[str, Any]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / FOLDER / f"{step:06d}"


def save(run: Path, trainer: Trainer, weights: Weights, facts: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of the step that the trainer is at, then remove all but the last `keep`.

    Called by all ranks; the first one writes. Raises `MissingResource` when the disk is full or cannot be written; what
    was there before stays.
    """
    folder = folder_of(run, trainer.step_number)
    tensors = contents(trainer)

    def written(whole: Whole) -> None:
        with published(folder) as unfinished:
            _write(unfinished, trainer, weights, tensors, whole)
            hashes = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
            write_facts(unfinished, facts_of(trainer, facts), hashes)
        remove_old(run, keep)

    writing(trainer.ranks, tensors, written)
    return folder


def contents(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by kind and name: `weights:...`, `optimizer:...`, `average:...`."""
    kinds: dict[str, Mapping[str, Tensor]] = {
        "weights": trainable(trainer.model),
        "optimizer": remembered(trainer.model, trainer.optimizers),
        "average": trainer.average.tensors if trainer.average else {},
    }
    return {f"{kind}:{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A hidden folder that becomes a checkpoint. Raises `MissingResource` when something cannot be written."""
    try:
        with atomic_folder(folder, overwrite=True) as unfinished:
            yield unfinished
    except (OSError, SafetensorError, MissingResource) as error:
        cause = error.cause if isinstance(error, MissingResource) else getattr(error, "strerror", None) or str(error)
        raise MissingResource(
            f"the checkpoint {folder} was not written",
            cause,
            "free some space and start the same command again: it goes on from the checkpoint before",
        ) from None


def _write(folder: Path, trainer: Trainer, weights: Weights, tensors: Mapping[str, Tensor], whole: Whole) -> None:
    weights.save(folder / "model", lambda name: whole(f"weights:{name}"))
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()
    for kind, name in (("optimizer", _OPTIMIZER), ("average", _AVERAGE)):
        entries = [
            Entry(key.partition(":")[2], tuple(tensor.shape), partial(_values, whole, key), tensor.dtype)
            for key, tensor in tensors.items()
            if key.startswith(f"{kind}:")
        ]
        if entries:
            with (folder / name).open("wb") as out:
                write_safetensors(out, entries, torch.float32)
    save_file({"torch": torch.get_rng_state()}, folder / RANDOM)


def _values(whole: Whole, key: str) -> Iterator[Tensor]:
    return flat_pieces(whole(key))


def facts_of(trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """What training.json says besides hashes."""
    return {"format": FORMAT, "step": trainer.step_number, "spikes": trainer.spikes.state(), **facts}


def write_facts(folder: Path, facts: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """Write training.json."""
    (folder / FACTS).write_text(json.dumps({**facts, "sha256": dict(hashes)}, indent=1), encoding="utf-8")


def before(run: Path, step: int) -> Path | None:
    """The last checkpoint of an earlier step, or None."""
    return next((folder for folder in reversed(_folders(run)) if int(folder.name) < step), None)


def remove_old(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`, and what dead processes left of those that they were writing."""
    for old in _folders(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    remove_left_behind(run / FOLDER)


def latest(run: Path, report: Callable[[str], None], ranks: Ranks = SINGLE) -> Checkpoint | None:
    """The last whole checkpoint of a run, or None. What is wrong with later ones is reported.

    The first rank looks; what it finds has to be there for all, on a disk that their machines share.
    """
    step = ranks.on_first(lambda: _latest_step(run, report))
    if step is None:
        return None
    folder = run / FOLDER / f"{step:06d}"
    try:
        return Checkpoint(folder, step, json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MissingResource(
            f"{folder} is not on this machine",
            "only the first one has it",
            "name an --out folder on a disk that all machines share",
        ) from None


def _latest_step(run: Path, report: Callable[[str], None]) -> int | None:
    for folder in reversed(_folders(run)):
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            wrong = _damaged(folder, facts["sha256"])
            if facts["format"] != FORMAT:
                raise BadInput(
                    f"{folder} cannot be gone on from",
                    f"it is of format {facts['format']}, this version writes {FORMAT}",
                    "use the version of cabochon that wrote it, or start in another folder",
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"{folder} is not whole ({error}): passed over")
            continue
        if not wrong:
            return int(facts["step"])
        report(f"{folder} is damaged ({', '.join(wrong)}): passed over")
    return None


def _damaged(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files that are not what they were. Several are read at once: those of many ranks are large."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: sha256(folder / name), hashes)
        return [name for name, now in zip(hashes, found, strict=True) if now != hashes[name]]


def restore(found: Checkpoint, trainer: Trainer, weights: Weights) -> None:
    """Put everything back as it was when the checkpoint was written, by however many ranks.

    Raises `BadInput` for that of another run.
    """
    average = trainer.average.tensors if trainer.average else {}
    if PARTS in found.facts:
        parts = Parts(sorted(found.folder.glob("part-*")))
        for name, p in trainable(trainer.model).items():
            parts.fill(f"weights:{name}", p)
        keys = [name.removeprefix("optimizer:") for name in parts.pieces if name.startswith("optimizer:")]
        remember(trainer.model, trainer.optimizers, keys, lambda key, mine: parts.fill(f"optimizer:{key}", mine))
        for name, tensor in average.items():
            parts.fill(f"average:{name}", tensor)
    else:
        weights.load(found.folder)
        state = load_file(found.folder / _OPTIMIZER)
        remember(trainer.model, trainer.optimizers, state, lambda key, mine: put(mine, state[key]))
        stored = load_file(found.folder / _AVERAGE) if average else {}
        for name, tensor in average.items():
            put(tensor, stored[name])
    torch.set_rng_state(load_file(found.folder / RANDOM)["torch"])
    trainer.spikes.restore(found.facts["spikes"])
    trainer.step_number = found.step


def _folders(run: Path) -> list[Path]:
    """Checkpoints by step; those of dead processes have hidden names."""
    return sorted(
        (path for path in (run / FOLDER).glob("*") if re.fullmatch(r"\d{6,}", path.name)), key=lambda p: int(p.name)
    )
