"""`cabochon eval`: what a model scores on tasks, beside what others have published; and two runs compared."""

import json as json_format
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cabochon.base.errors import MissingResource, UsageError
from cabochon.cli.options import DeviceOptions, HubOptions, Json, Model, folder_argument, load_lm

if TYPE_CHECKING:
    from cabochon.evaluate.results import Item, Report
    from cabochon.evaluate.run import Tasks
    from cabochon.lm import LM

INTERRUPTED = 130


@Parameter(name="*", group="What is asked, and how")
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Tasks and the form of their prompts."""

    tasks: Annotated[
        str,
        Parameter(help="mini, gemma2-report, leaderboard-2, mini-chat, or tasks of the harness, separated by commas."),
    ] = "mini"
    shots: Annotated[int | None, Parameter(help="Examples before each item; left out: as suite and task say.")] = None
    limit: Annotated[int | None, Parameter(help="Only so many items of each task.")] = None
    chat: Annotated[bool | None, Parameter(help="Ask in Gemma's chat format; left out: as the suite says.")] = None
    formats: Annotated[int, Parameter(help="Also the spread of scores over so many formats of the prompts.")] = 0
    data: Annotated[Path | None, Parameter(help="Folder with copies of data sets, in place of the Hub.")] = None
    include: Annotated[tuple[Path, ...], Parameter(negative="", help="Folder with more task files.")] = ()
    seed: Annotated[int, Parameter(help="Of answers that are drawn, where a task wants that.")] = 0


@Parameter(name="*", group="Ablations")
@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What is changed in the model; --softcap off is another."""

    window: Annotated[int | None, Parameter(help="Positions that local layers see, in place of the model's own.")] = (
        None
    )
    bits: Annotated[Literal[16, 8, 4] | None, Parameter(help="Of weights: 16, or rounded while loading.")] = None


def evaluate(
    model: Model = None,
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Folder for the report as JSON, Markdown and HTML, and items.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, Parameter(negative="", help="Two folders of earlier runs: how they differ.")
    ] = None,
    cache: Annotated[
        bool, Parameter(help="Keep finished requests, so that the same command goes on with them.")
    ] = True,
    json: Json = False,
    asked: EvalOptions = EvalOptions(),
    changed: AblationOptions = AblationOptions(),
    hub: HubOptions = HubOptions(),
    device: DeviceOptions = DeviceOptions(),
) -> int | None:
    """Score a model on tasks of EleutherAI's lm-evaluation-harness.

    The suite mini needs no network. The others fetch their data from the Hub, or take it from --data. A run that was
    interrupted goes on where it stopped when the same command is typed again.

    Example: cabochon eval --tasks mini --limit 20

    Example: cabochon eval google/gemma-2-9b --tasks gemma2-report --out runs/9b

    Example: cabochon eval --compare runs/9b runs/mine
    """
    if compare:
        _compare(*compare, json=json)
        return None
    folder = folder_argument(out, "--out") if out else None
    tasks = _tasks(asked, hub.offline)
    for unknown in tasks.unknown:  # now, and not after an hour
        print(f"note: {unknown.what} ({unknown.hint}); the other tasks are run", file=sys.stderr)
    lm = _model(model, hub, device, changed)
    report = _run(lm, tasks, model or "the model inside", _settings(asked, changed, device), folder, cache)
    if json:
        print(json_format.dumps(asdict(report)))
    else:
        _print(report)
    if any(note.startswith("interrupted") for note in report.notes):
        return INTERRUPTED
    return max((f.exit_code for f in report.failures), default=None)


def _tasks(asked: EvalOptions, offline: bool) -> "Tasks":
    for name, value in {"shots": asked.shots, "limit": asked.limit}.items():
        if value is not None and value < (name == "limit"):
            raise UsageError(f"--{name} cannot be {value}", "it has to be a number of things", f"change --{name}")
    from cabochon.evaluate.formats import check_formats
    from cabochon.evaluate.run import Options, Tasks

    check_formats(asked.formats)
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names none", "there is nothing to ask", "--tasks mini")
    chosen = {name: value for name, value in asdict(asked).items() if name != "tasks"}
    return Tasks(names, Options(**chosen, offline=offline), _cache_folder())


def _model(model: str | None, hub: HubOptions, device: DeviceOptions, changed: AblationOptions) -> "LM":
    if changed.bits:
        if device.weights != "auto":
            raise UsageError("--bits and --weights say the same", "both were given", "leave one out")
        forms: dict[int, Literal["bf16", "int8", "int4"]] = {16: "bf16", 8: "int8", 4: "int4"}
        device = replace(device, weights=forms[changed.bits])
    if changed.window is not None and changed.window < 1:
        raise UsageError(f"--window cannot be {changed.window}", "a position sees itself", "--window 1024")
    lm = load_lm(model, hub, device)
    if changed.window:
        lm.model.config = replace(lm.config, sliding_window=changed.window)
    return lm


def _run(lm: "LM", tasks: "Tasks", name: str, settings: dict[str, Any], folder: Path | None, cache: bool) -> "Report":
    from cabochon.evaluate.cache import model_key, open_store
    from cabochon.evaluate.harness import Backend
    from cabochon.evaluate.page import page
    from cabochon.evaluate.results import write_items
    from cabochon.evaluate.run import run
    from cabochon.evaluate.show import markdown

    kept: dict[str, list[Item]] = {}

    def done(task: str, items: "list[Item]") -> None:
        kept[task] = items
        if folder:
            _written(folder, lambda: write_items(folder, task, items))

    with open_store(_cache_folder() / "requests" if cache else None, model_key(lm) if cache else "") as store:
        backend = Backend(lm, store, tasks.options.seed)
        report = run(backend, tasks, name=name, settings=settings, done=done)
    if folder:
        texts = {"report.md": markdown(report), "report.html": page(report, kept)}
        _written(folder, lambda: report.write(folder))
        for file, text in texts.items():
            _written(folder, lambda file=file, text=text: _write_text(folder / file, text))  # type: ignore[misc]
    return report


def _compare(first: Path, second: Path, *, json: bool) -> None:
    from cabochon.evaluate.compare import compare
    from cabochon.evaluate.show import differences_table

    found = compare(first.expanduser(), second.expanduser())
    if json:
        print(json_format.dumps([asdict(one) for one in found]))
        return
    from rich.console import Console

    Console().print(differences_table(found, first.name, second.name))


def _print(report: "Report") -> None:
    from rich.console import Console

    from cabochon.evaluate.show import notes, spreads_table, table

    if report.results:
        Console().print(table(report))
    if report.spreads:
        Console().print(spreads_table(report))
    for note in notes(report):
        print(f"note: {note}", file=sys.stderr)
    for failure in report.failures:
        print(failure, file=sys.stderr)


def _settings(asked: EvalOptions, changed: AblationOptions, device: DeviceOptions) -> dict[str, Any]:
    """What was chosen, for the report."""
    from cabochon.base.version import package_version

    chosen = {"tasks": asked.tasks, "shots": asked.shots, "limit": asked.limit, "chat": asked.chat}
    model = {"weights": device.weights, "dtype": device.dtype, "adapter": device.adapter, "window": changed.window}
    bits = {"bits": changed.bits, "softcap": device.softcap}
    return {**chosen, **model, **bits, "cabochon": package_version()}


def _cache_folder() -> Path:
    """Where suites and finished requests are kept, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cabochon" / "eval"


def _written(folder: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        cause = error.strerror or str(error)
        raise MissingResource(f"{folder} was not written", cause, "choose another place") from None


def _write_text(path: Path, text: str) -> None:
    from cabochon.base.files import atomic_write

    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace"))
