"""Checkpoints of which every rank writes its own part, by a thread, while training goes on.

    OUT/checkpoints/000400/   part-00001-of-00008.safetensors, ...: what each rank has of weights, optimizer and average
                              random.safetensors
                              training.json: as in other checkpoints, and the number of parts

A model of 27 billion weights is 327 GB with its optimizer, which one process writes in minutes; here the others do not
wait for it, and training stops only while the values are copied to the memory of the CPU. Such a checkpoint is not a
model folder: the run's result is.
"""

import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cabochon.base.files import sha256
from cabochon.train.checkpoint import PARTS, RANDOM, contents, facts_of, folder_of, published, remove_old, write_facts
from cabochon.train.parts import Part, write_parts
from cabochon.train.ranks import Ranks
from cabochon.train.shards import box, is_sharded, local
from cabochon.train.step import Trainer


class BackgroundSaver:
    """Saves the checkpoints of a run, one at a time. Every method is called by all ranks."""

    def __init__(self, run: Path, trainer: Trainer) -> None:
        self.run, self.trainer = run, trainer
        # The thread has a way of its own to the other ranks' threads.
        self.ranks = replace(trainer.ranks, group=torch.distributed.new_group(backend="gloo"))
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def save(self, facts: dict[str, Any], keep: int) -> None:
        """Take a copy of everything and begin to write it, once the checkpoint before is written. Raises as `wait`.

        When it is whole, all but the last `keep` are removed.
        """
        self.wait()
        step, said = self.trainer.step_number, facts_of(self.trainer, facts)
        parts, random = _parts(self.trainer), torch.get_rng_state()
        self.thread = threading.Thread(target=self._write, args=(step, said, parts, random, keep), daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Let the thread come to its end, whatever that is; `wait` says it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises `MissingResource` when it cannot be written."""
        self.finish()
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed

    def _write(self, step: int, facts: dict[str, Any], parts: list[Part], random: torch.Tensor, keep: int) -> None:
        try:
            with self.ranks.watched():
                _publish(self.ranks, folder_of(self.run, step), facts, parts, random)
                self.ranks.on_first(lambda: remove_old(self.run, keep))
        except BaseException as error:
            self.failed = error


def _publish(ranks: Ranks, folder: Path, facts: dict[str, Any], parts: list[Part], random: torch.Tensor) -> None:
    """All ranks write into one hidden folder; when all have, the first one notes what is there and renames it."""
    with ExitStack() as stack:
        unfinished = Path(ranks.on_first(lambda: str(stack.enter_context(published(folder)))))
        written = ranks.gather(_write_own(ranks, unfinished, parts))

        def finish() -> None:
            wrong = [f"rank {rank}: {said['error']}" for rank, said in enumerate(written) if "error" in said]
            if wrong:
                raise OSError("; ".join(wrong))
            hashes = {said["name"]: said["sha256"] for said in written}
            absent = [name for name in hashes if not (unfinished / name).is_file()]
            if absent:
                raise OSError(f"{absent[0]} is not on the first machine: --out has to be on a disk that all share")
            save_file({"torch": random}, unfinished / RANDOM)
            write_facts(unfinished, facts | {PARTS: ranks.world}, hashes | {RANDOM: sha256(unfinished / RANDOM)})
            stack.close()  # renamed before the others hear of it

        ranks.on_first(finish)


def _write_own(ranks: Ranks, folder: Path, parts: list[Part]) -> dict[str, str]:
    """This rank's file, its hash, or what is wrong."""
    path = folder / f"part-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
    try:
        write_parts(path, parts)
        return {"name": path.name, "sha256": sha256(path)}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _parts(trainer: Trainer) -> list[Part]:
    """Copies of what this rank has, but for what another one has as well."""
    ranks, found = trainer.ranks, []
    for name, tensor in contents(trainer).items():
        if not is_sharded(tensor):
            mine = ranks.first
        else:  # over all ranks, or alike within each group of tensor parallelism
            mine = tensor.device_mesh.size() == ranks.world or ranks.rank % ranks.tensor_parallel == 0  # type: ignore[attr-defined]
        part = local(tensor).detach()
        if mine and part.numel():
            found.append(Part(name, box(tensor)[0], part.to("cpu", copy=True)))
    return found
