"""A plan carried out: tensor after tensor, out of mapped files, into the shards of a new folder.

Blocks of a few MB are read and merged by a pool of threads, so memory does not grow with the models; `output.py` has
them written behind the back of the merging, and notes what is done: a merge that is killed, or finds the disk full,
goes on from there when it is started again.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.base.errors import BadInput, MissingResource
from cabochon.base.files import resumable_folder
from cabochon.merge.config import ModelRef
from cabochon.merge.embeddings import embeddings
from cabochon.merge.methods.blocks import Sink, Whole, into
from cabochon.merge.methods.method import merge
from cabochon.merge.output import Output, opened
from cabochon.merge.plan import EMBEDDING, Job, Operand, Plan
from cabochon.merge.rows import whole_of_rows
from cabochon.merge.sources import Opened
from cabochon.merge.vocabulary import Vocabulary
from cabochon.weights.names import to_hf
from cabochon.weights.save import SHARD_BYTES, check_replaces_a_model, write_documents


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
            output = stack.enter_context(opened(work, plan, shard_bytes))
            run = stack.enter_context(workers(threads))  # ends first
            _merge_all(plan, models, output, run, report)
            output.commit()
            write_documents(work.folder, plan.shape, plan.dtype, output.placed, None)
            for name, content in (files or {}).items():
                (work.folder / name).write_bytes(content)
    except OSError as error:
        raise MissingResource(
            f"{folder} was not written",
            error.strerror or str(error),
            "free some space or choose another place; started again, the merge goes on where it stopped",
        ) from None


def execute_in_memory(
    plan: Plan, models: Mapping[ModelRef, Opened], out: Mapping[str, Tensor], *, threads: int = 0
) -> None:
    """Merge into tensors of the plan's shapes, float of any type, by our names; else as `execute`. Nothing is written.

    Raises `BadInput` as `execute`; some of the tensors are then merged.
    """
    with workers(threads) as run:
        _merge_all(plan, models, _Memory(out), run, lambda _: None)


def _merge_all(
    plan: Plan,
    models: Mapping[ModelRef, Opened],
    output: "Output | _Memory",
    run: Callable[..., Any],
    report: Callable[[int], None],
) -> None:
    def announce(stage: list[Job]) -> None:
        for job in stage:
            for operand in () if job.name in output.done else job.inputs:
                models[operand.model].announce(operand.name)

    with ThreadPoolExecutor(1) as reader:  # a thread of its own: the system returns only when most of it is read
        reader.submit(announce, next(plan.stages()))
        for stage, following in _with_next(plan.stages()):
            reader.submit(announce, following)
            _merge_stage(plan, stage, models, output, run)
            report(sum(torch.Size(job.shape).numel() for job in stage) * plan.dtype.itemsize)


def _merge_stage(
    plan: Plan,
    stage: list[Job],
    models: Mapping[ModelRef, Opened],
    output: "Output | _Memory",
    run: Callable[..., Any],
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
            sink = output.sink(job.name)
            merge(method, wholes[job.name], job.settings, sink, measured=measured, dtype=plan.dtype)
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


class _Memory:
    """Tensors instead of shards."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.done = tensors, frozenset[str]()

    def sink(self, name: str) -> Sink:
        return into(self._tensors[name])

    def finished(self, name: str) -> None:
        """Nothing has to be noted."""


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
