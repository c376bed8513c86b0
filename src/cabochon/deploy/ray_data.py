"""Files of a data set answered by Ray Data: an engine on each of many GPUs or machines, which see the same folder."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError
from cabochon.base.progress import track
from cabochon.deploy.ray_connection import check_room, connected
from cabochon.lm import load
from cabochon.lm.dataset import Dataset, Part

_KINDS = {kind.__name__: kind for kind in (UsageError, BadInput, MissingResource)}


class Worker:
    """One engine. Made by Ray, once in each of its processes.

    What a user can mend comes back as part of a row: an exception would reach the command wrapped in Ray's own, and
    Ray would make a process whose model cannot be loaded again and again.
    """

    def __init__(self, model: Mapping[str, Any], dataset: Dataset) -> None:
        self._dataset, self._failed = dataset, ""
        try:
            self._lm = load(**model)
        except CabochonError as error:
            self._failed = _packed(error)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer files of prompts; gives their names, and what went wrong."""
        for start, stop, file in zip(batch["start"], batch["stop"], batch["file"], strict=True):
            if not self._failed:
                self._answer(Part(int(start), int(stop), str(file)))
        return {"file": np.asarray(batch["file"]), "failed": np.asarray([self._failed] * len(batch["file"]))}

    def _answer(self, part: Part) -> None:
        if Path(self._dataset.out, part.file).exists():
            return  # written by a process that was lost before it could say so
        try:
            self._dataset.answer(self._lm, part)
        except CabochonError as error:
            self._failed = _packed(error)
        except OSError as error:
            self._failed = _packed(self._dataset.unwritten(error))


def answer(
    dataset: Dataset, parts: Sequence[Part], model: Mapping[str, Any], *, engines: int, gpus: float, cpus: float
) -> None:
    """Answer these files with so many engines side by side, on the Ray that RAY_ADDRESS names or a local one.

    A file whose engine dies is given to another one. Raises what an engine raised, and `MissingResource` when Ray is
    not there, has no room for a single engine, or gives up.
    """
    with redirect_stdout(sys.stderr), connected():  # Ray prints what it has to say, where the command's result belongs
        check_room(gpus, cpus)
        _quieten()
        rows = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
        # No file waits behind a long one. A process that is lost is replaced without end, which is Ray's default here.
        workers = ray.data.ActorPoolStrategy(size=engines, max_tasks_in_flight_per_actor=1)
        options = {"num_gpus": gpus} if gpus else {"num_cpus": cpus}
        done = rows.map_batches(Worker, fn_constructor_args=(model, dataset), compute=workers, batch_size=1, **options)
        with track(len(parts), "answering", unit="files") as advance:
            for row in done.iter_rows():
                if row["failed"]:
                    raise _unpacked(row["failed"])
                advance(1)


def _quieten() -> None:
    """Warnings alone: what is under way is told by a bar of ours."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of the next line
    ray.data.DataContext.get_current().enable_progress_bars = False


def _packed(error: CabochonError) -> str:
    return json.dumps([type(error).__name__, error.what, error.cause, error.hint])


def _unpacked(text: str) -> CabochonError:
    kind, *told = json.loads(text)
    return _KINDS.get(kind, CabochonError)(*told)
