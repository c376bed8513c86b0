"""A plan carried out: tensor after tensor, out of mapped files, into the shards of a new folder.

Blocks of a few MB are read, merged and written by a pool of threads, so memory does not grow with the models. What has
been written is forced to the disk behind the back of the merging, and only then noted as done: a merge that is killed,
or finds the disk full, goes on from there when it is started again.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.files import resumable_folder
from cabochon.merge.config import ModelRef
from cabochon.merge.embeddings import embeddings
from cabochon.merge.methods.blocks import Sink, Whole, fitting
from cabochon.merge.methods.method import merge
from cabochon.merge.plan import EMBEDDING, Job, Operand, Plan
from cabochon.merge.rows import whole_of_rows
from cabochon.merge.sources import Opened
from cabochon.merge.vocabulary import Vocabulary
from cabochon.weights.names import to_hf
from cabochon.weights.save import SHARD_BYTES, Entry, check_replaces_a_model, file_header, shards, write_documents

_force_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the second
COMMIT_BYTES = 1 << 28  # written between two notes of what is done: a second's work
_DONE = ".done"  # the notes: a line of JSON names each time


def execute(
    plan: Plan,
    models: Mapping[ModelRef, Opened],
    folder: Path,
    *,
    key: str,
    files: Mapping[str, bytes] | None = None,
    threads: int = 0,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the merged model, whole or not at all.

    Args:
        plan: what to do; see `plan.plan`.
        models: the models that it speaks of.
        folder: new or empty, unless `overwrite`, which replaces a model folder and nothing else.
        key: what the result depends on. Unfinished work with the same key is taken up again.
        files: more files for the folder, by name: the tokenizer's, the model card.
        threads: how many; 0: one for each core. The result has the same bits for any number.
        shard_bytes: the most bytes of weights in one file (a single tensor may be larger).
        report: called with the bytes of each tensor that is done; together `plan.nbytes`.

    Raises:
        BadInput: a tensor holds NaN or infinity, or does not fit the output's type; named with its file.
        UsageError: the folder is in use.
        MissingResource: no space or no permission. What is done is kept for the next start.
    """
    check_replaces_a_model(folder)
    try:
        with resumable_folder(folder, key, overwrite=overwrite) as work, ExitStack() as stack:
            run = stack.enter_context(workers(threads))
            output = stack.enter_context(_output(work, plan, shard_bytes))
            for stage, following in _with_next(plan.stages()):
                for job in following:
                    for operand in () if job.name in output.done else job.inputs:
                        models[operand.model].announce(operand.name)
                _merge_stage(plan, stage, models, output, run)
                report(sum(torch.Size(job.shape).numel() for job in stage) * plan.dtype.itemsize)
            output.commit()
            write_documents(work, plan.shape, plan.dtype, output.placed, None)
            for name, content in (files or {}).items():
                (work / name).write_bytes(content)
    except OSError as error:
        raise MissingResource(
            f"{folder} was not written",
            error.strerror or str(error),
            "free some space or choose another place; started again, the merge goes on where it stopped",
        ) from None


def _merge_stage(
    plan: Plan, stage: list[Job], models: Mapping[ModelRef, Opened], output: "_Output", run: Callable[..., Any]
) -> None:
    """Merge tensors that belong together, unless they are done."""
    todo = [job for job in stage if job.name not in output.done]
    if not todo:
        return
    wholes = {job.name: _whole(job, models, plan.vocabulary, run) for job in stage}
    method, measured = plan.method, None
    if method.per_layer and method.measure and stage[0].layer is not None:
        measured = sum(method.measure(wholes[job.name], job.settings) for job in stage)
    for job in todo:
        try:
            merge(method, wholes[job.name], job.settings, output.sink(job.name), measured=measured)
        except BadInput as error:
            raise BadInput(f"{to_hf(job.name)}: {error.what}", error.cause, error.hint) from None
        for operand in job.inputs:
            models[operand.model].let_go(operand.name)
        output.finished(job.name)


def _whole(
    job: Job, models: Mapping[ModelRef, Opened], vocabulary: Vocabulary | None, run: Callable[..., Any]
) -> Whole:
    def tensor(operand: Operand) -> Tensor:
        return models[operand.model].tensor(operand.name)

    names = tuple(models[o.model].place(o.name) for o in job.inputs)
    if vocabulary and job.name == EMBEDDING:
        root = job.base.model if job.base else None
        aligned = embeddings(vocabulary, {o.model: tensor(o) for o in job.inputs}, root)
        return aligned.whole([o.model for o in job.operands], root, run=run, names=names)
    if any(models[o.model].is_made(o.name) for o in job.inputs):
        around = models[job.base.model].rows(job.base.name) if job.base else None
        makers = [models[o.model].rows(o.name) for o in job.operands]
        return whole_of_rows(job.shape, makers, around, run=run, names=names)
    base = tensor(job.base) if job.base else None
    return Whole(tuple(tensor(o) for o in job.operands), base, run=run, names=names)


class _Output:
    """The shards on the disk, and the notes of which tensors in them are done."""

    def __init__(self, work: Path, plan: Plan, shard_bytes: int, committer: ThreadPoolExecutor) -> None:
        entries = {job.name: Entry(to_hf(job.name), job.shape, tuple) for job in plan.jobs}
        self.placed = shards(entries.values(), plan.dtype, shard_bytes)
        self._dtype, self._committer, self._commits = plan.dtype, committer, list[Future[None]]()
        self._files: dict[str, int] = {}
        self._turn = Lock()  # of writing: the system has one for each file, and burns a core in waiting for it
        self._places: dict[str, tuple[int, int, int]] = {}  # our name: descriptor, offset, bytes
        ours = {entry.name: name for name, entry in entries.items()}
        fresh = False
        for file, held in self.placed.items():
            header = file_header(held, plan.dtype)
            size = len(header) + sum(entry.nbytes(plan.dtype) for entry in held)
            fresh |= self._open(work / file, header, size)
            offset = len(header)
            for entry in held:
                self._places[ours[entry.name]] = (self._files[file], offset, entry.nbytes(plan.dtype))
                offset += entry.nbytes(plan.dtype)
        self._notes = os.open(work / _DONE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if fresh:
            os.ftruncate(self._notes, 0)
        self.done = _read_notes(work / _DONE)
        self._pending: list[str] = []

    def _open(self, path: Path, header: bytes, size: int) -> bool:
        """Open a shard, and make it unless it is there as it has to be. Gives whether it was made."""
        descriptor = self._files[path.name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(descriptor).st_size == size and os.pread(descriptor, len(header), 0) == header:
            return False
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        _write_at(descriptor, memoryview(header), 0)
        return True

    def sink(self, name: str) -> Sink:
        """Where the blocks of a tensor go. It may be called from several threads."""
        descriptor, offset, _ = self._places[name]
        dtype = self._dtype

        def put(start: int, values: Tensor) -> None:
            ready = fitting(values, dtype).contiguous().view(-1).view(torch.uint8)
            with self._turn:
                _write_at(descriptor, ready.numpy().data, offset + start * dtype.itemsize)

        return put

    def finished(self, name: str) -> None:
        """Note a tensor as done, soon."""
        self._pending.append(name)
        if sum(self._places[name][2] for name in self._pending) >= COMMIT_BYTES:
            self._commit_behind()

    def commit(self) -> None:
        """Wait until all that is finished is on the disk and noted. Raises `OSError` when it cannot be."""
        self._commit_behind()
        for commit in self._commits:
            commit.result()

    def _commit_behind(self) -> None:
        names, self._pending = self._pending, []
        self._commits.append(self._committer.submit(self._force, names))

    def _force(self, names: list[str]) -> None:
        # The system tells once that data was lost, whoever's it was: after that nothing more can be called done.
        if any(commit.done() and commit.exception() for commit in self._commits):
            return
        for descriptor in {self._places[name][0] for name in names}:
            _force_data(descriptor)
        os.write(self._notes, json.dumps(names).encode() + b"\n")
        _force_data(self._notes)

    def close(self) -> None:
        for descriptor in (*self._files.values(), self._notes):
            os.close(descriptor)


@contextmanager
def _output(work: Path, plan: Plan, shard_bytes: int) -> Iterator[_Output]:
    with ThreadPoolExecutor(1) as committer:
        output = _Output(work, plan, shard_bytes, committer)
        try:
            yield output
        finally:
            committer.shutdown()
            output.close()


def _read_notes(path: Path) -> set[str]:
    """The names in the notes; a last line that was cut off says nothing."""
    names: set[str] = set()
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            names.update(json.loads(line))
    return names


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def workers(threads: int) -> Iterator[Callable[..., Any]]:
    """A `map` that calls a function with many things, in threads that compute with one core each."""
    count = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    single = partial(torch.set_num_threads, 1)
    single()
    pool = ThreadPoolExecutor(count, initializer=single)
    try:
        yield pool.map if count > 1 else map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _with_next(stages: Iterator[list[Job]]) -> Iterator[tuple[list[Job], list[Job]]]:
    """Each stage with the one that follows it, which is empty for the last."""
    current = next(stages, None)
    while current is not None:
        following = next(stages, None)
        yield current, following or []
        current = following
