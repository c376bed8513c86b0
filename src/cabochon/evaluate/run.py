"""One evaluation: tasks of the harness, one after the other, each kept as soon as it is done."""

import importlib.util
import logging
import os
import random
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cabochon.base.errors import BadInput, CabochonError, MissingResource, UsageError, nearest
from cabochon.evaluate import mini
from cabochon.evaluate.data import Datasets, offline_if_out_of_reach
from cabochon.evaluate.formats import apply_format, spread_of
from cabochon.evaluate.results import Failure, Item, Report, Result, Spread
from cabochon.evaluate.suites import SUITES, Entry, published_beside
from cabochon.evaluate.summary import items_of, results_of

if TYPE_CHECKING:
    from cabochon.evaluate.harness import Backend

EXAMPLES_SEED = 1234  # the harness's own default: the same examples as everybody's
PACKAGE = str(Path(__file__).parent.parent)


@dataclass(frozen=True)
class Options:
    """How tasks are run.

    Attributes:
        shots: examples before each item, in place of what suite and task say; a task that forbids examples has none.
        limit: only so many items of each task.
        chat: in Gemma's chat format; None: as the suite says.
        formats: of multiple-choice tasks, also the spread over so many formats of the prompts.
        data: a folder with copies of data sets, in place of the Hub.
        include: folders with more task files.
        seed: of answers that are drawn.
        offline: do not ask the Hub.
    """

    shots: int | None = None
    limit: int | None = None
    chat: bool | None = None
    formats: int = 0
    data: Path | None = None
    include: tuple[Path, ...] = ()
    seed: int = 0
    offline: bool = False


@dataclass
class Finished:
    """What a run has so far."""

    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    spreads: list[Spread] = field(default_factory=list)
    items: dict[str, list[Item]] = field(default_factory=dict)


def require_harness() -> None:
    """Raises `MissingResource` when the `eval` extra is not installed. Keeps the harness quiet where it is."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingResource(
            "evaluations need EleutherAI's lm-evaluation-harness",
            "lm_eval is not installed",
            "pip install 'cabochon[eval]'",
        )
    os.environ.setdefault("TQDM_DISABLE", "1")  # it has bars of its own for every step
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Tasks:
    """The tasks that a run was asked for.

    Args:
        names: suites, or tasks, groups and tags of the harness, or task files.
        cache: where the mini suite is kept.

    Attributes:
        unknown: names that nobody knows; they are reported, and the others run.

    Raises `UsageError` when nobody knows any of the names, and `MissingResource` for a folder that is not there and as
    `require_harness`.
    """

    def __init__(self, names: Sequence[str], options: Options, cache: Path) -> None:
        require_harness()
        from lm_eval.tasks import TaskManager

        self.options = options
        _check_folders(options)
        self.entries = [pair for name in names for pair in _entries(name)]
        ours = [entry.task.startswith("mini") for _, entry in self.entries]
        self.mini = mini.ready(cache) if any(ours) else None
        folders = [*(folder.expanduser() for folder in options.include), *([self.mini] if self.mini else [])]
        # Reading the thousands of task files that the harness brings takes seconds.
        self.manager = TaskManager(include_path=[str(f) for f in folders], include_defaults=not all(ours))
        if not all(ours):
            offline_if_out_of_reach(offline=options.offline)
        found = {entry.task: self._unknown(entry.task) for _, entry in self.entries}
        errors = [error for error in found.values() if error]
        if len(errors) == len(found):
            raise errors[0]
        self.unknown = [Failure.of(task, error) for task, error in found.items() if error]
        self.entries = [(suite, entry) for suite, entry in self.entries if not found[entry.task]]

    def _unknown(self, name: str) -> UsageError | None:
        known = self.manager.all_tasks
        if name in known or Path(name).is_file():
            return None
        close = nearest(name, [*known, *SUITES])
        return UsageError(
            f"no task named {name!r}",
            f"there are the suites {', '.join(SUITES)}, and {len(known)} tasks of the harness",
            f"did you mean {close!r}?" if close else "`lm_eval ls tasks` lists the harness's",
        )

    def load(self, entry: Entry) -> dict[str, Any]:
        """Tasks and groups of an entry, ready to be run."""
        loaded: dict[str, Any] = self.manager.load([entry.task])
        wanted = entry.shots if self.options.shots is None else self.options.shots
        for task in loaded["tasks"].values():
            _check_fields(task)
            own = task.get_config("num_fewshot")
            if own is None or (wanted is not None and own != 0):
                task.set_config(key="num_fewshot", value=wanted or 0)
            task.set_fewshot_seed(seed=EXAMPLES_SEED)
        return loaded


def run(
    backend: "Backend",
    tasks: Tasks,
    *,
    name: str,
    settings: Mapping[str, Any],
    done: Callable[[str, list[Item]], None] = lambda task, items: None,
) -> Report:
    """Run all tasks. One that cannot be run becomes a `Failure`, and the others go on.

    Args:
        backend: the model.
        name: of the model, for the report.
        settings: for the report.
        done: called with the items of each task once it is done.
    """
    started, found = time.perf_counter(), Finished(failures=list(tasks.unknown))
    notes: list[str] = []
    for suite, entry in tasks.entries:
        try:
            _one(backend, tasks, suite, entry, found)
        except KeyboardInterrupt:
            notes.append("interrupted: finished requests are kept, and the same command goes on from there")
            break
        except CabochonError as error:
            found.failures.append(Failure.of(entry.task, error))
        for task, items in found.items.items():
            done(task, items)
        found.items.clear()
    if backend.unsaid:
        notes.append(f"{backend.unsaid} prompts had instructions as a system turn, which Gemma 2 has not: left out")
    if backend.store.reused:
        notes.append(f"{backend.store.reused} requests were known from earlier runs")
    if backend.store.trouble:
        notes.append(f"finished requests are not kept any more: {backend.store.trouble}")
    seconds = time.perf_counter() - started
    return Report(name, dict(settings), found.results, found.failures, found.spreads, notes, seconds)


def _one(backend: "Backend", tasks: Tasks, suite: str | None, entry: Entry, found: Finished) -> None:
    options = tasks.options
    chat = options.chat if options.chat is not None else bool(suite and SUITES[suite].chat)
    if chat:
        backend.check_chat()
    with Datasets(options.data) as datasets, _Told(entry.task, datasets):
        output = _evaluate(backend, tasks.load(entry), options, chat)
    published = published_beside(SUITES[suite], backend.lm.config) if suite else {}
    baselines = mini.read_baselines(tasks.mini) if tasks.mini else {}
    found.results += results_of(output, entry, published, baselines, backend.truncated)
    found.items |= items_of(output)
    if options.formats:
        with Datasets(options.data) as datasets, _Told(entry.task, datasets):
            found.spreads += _spreads(backend, tasks, entry, chat)


def _evaluate(backend: "Backend", loaded: dict[str, Any], options: Options, chat: bool) -> dict[str, Any]:
    import numpy as np
    from lm_eval.evaluator import evaluate

    random.seed(0)  # as the harness's own command does: some tasks draw without saying from where
    np.random.seed(EXAMPLES_SEED)
    output: dict[str, Any] = evaluate(
        lm=backend,
        task_dict=loaded,
        limit=options.limit,
        bootstrap_iters=1000,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return output


def _spreads(backend: "Backend", tasks: Tasks, entry: Entry, chat: bool) -> list[Spread]:
    """Of the entry's score; nothing when it has no choices whose prompts could be written otherwise."""
    scores = []
    for number in range(tasks.options.formats):
        loaded = tasks.load(entry)
        if not all(apply_format(task, number) for task in loaded["tasks"].values()):
            return []
        output = _evaluate(backend, loaded, tasks.options, chat)
        scores.append([r for r in results_of(output, entry, {}, {}, {}) if r.counts and r.part_of is None])
    return [spread_of(list(each)) for each in zip(*scores, strict=True)]


def _check_folders(options: Options) -> None:
    for flag, folder in [("data", options.data), *(("include", folder) for folder in options.include)]:
        if folder is not None and not folder.expanduser().is_dir():
            raise MissingResource(f"--{flag} {folder} cannot be read", "there is no such folder", "check the path")


def _check_fields(task: Any) -> None:
    """Raises `BadInput` for a label that the items do not have: the harness would take its name for the answer."""
    label, fields = task.get_config("doc_to_target"), getattr(task, "features", [])
    is_name = isinstance(label, str) and label.isidentifier()
    if task.OUTPUT_TYPE == "multiple_choice" and is_name and label not in [*fields, *_constant_choices(task)]:
        raise BadInput(
            f"{task.task_name} cannot be run",
            f"its items have no field {label!r}; they have {', '.join(fields)}",
            "check its task file and its data",
        )


def _constant_choices(task: Any) -> Sequence[str]:
    choices = task.get_config("doc_to_choice")
    return choices if isinstance(choices, list) else []


def _entries(name: str) -> list[tuple[str | None, Entry]]:
    """A suite's, or a task as the suite that has it runs it, or as the harness does."""
    if name in SUITES:
        return [(name, entry) for entry in SUITES[name].entries]
    known = [(suite, entry) for suite, found in SUITES.items() for entry in found.entries if entry.task == name]
    return list(known[:1]) or [(None, Entry(name, name, ""))]


class _Told:
    """Turns what goes wrong in a task, its file or its data into words; what goes wrong in this package is let out."""

    def __init__(self, task: str, datasets: Datasets) -> None:
        self._task, self._datasets = task, datasets

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, CabochonError):
            return
        if self._datasets.failed:
            raise self._datasets.explain(self._task, error) from None
        inner = traceback.extract_tb(trace)[1:]
        if any(frame.filename.startswith(PACKAGE) for frame in inner if not frame.filename.startswith(__file__)):
            return
        raise _explained(self._task, error) from None


def _explained(task: str, error: Exception) -> CabochonError:
    what = f"{task} cannot be run"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return MissingResource(what, f"it needs {error.name}, which is not installed", f"pip install {error.name}")
    if isinstance(error, ModuleNotFoundError):  # of the harness, which names one of its extras
        extra = re.search(r"lm[-_]eval\[[\w-]+\]", str(error))
        return MissingResource(what, _cause(error), f"pip install {extra[0]!r}" if extra else "install what it names")
    return BadInput(what, _cause(error), "check its task file and its data")


def _cause(error: Exception) -> str:
    text = str(error).strip().splitlines()
    said = text[0] if text else ""
    if isinstance(error, KeyError):
        return f"an item has no field {said}"
    if type(error).__name__ == "UndefinedError":  # of jinja2, in which task files are written
        return f"an item lacks a field: {said}"
    return f"{type(error).__name__}: {said}"
