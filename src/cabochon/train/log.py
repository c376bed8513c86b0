"""What a run tells: lines of JSON always, a curve as SVG, and trackers where asked for.

OUT/log.jsonl   {"step": 20, "loss": 2.31, "tokens": 81920, ...}; evaluations have "eval_loss"
OUT/loss.svg    both losses over the steps, drawn anew at every evaluation and at the end
OUT/reward.svg  and so on: what else a kind of training has curves of
"""

import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cabochon.base.errors import MissingResource
from cabochon.base.files import atomic_write
from cabochon.base.plot import Series, line_plot

LOG, CURVE = "log.jsonl", "loss.svg"
Record = dict[str, Any]
Tracker = Callable[[Record], None]
Start = Callable[[Path, Mapping[str, Any], int], Tracker]  # the run's folder, its settings, the steps done


class Log:
    """The log of a run, appended to line by line."""

    def __init__(
        self, run: Path, step: int, trackers: tuple[Tracker, ...] = (), curves: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Open it for a run that has done `step` steps; what was logged after that is about to happen again.

        `curves` are names of other measures that are drawn, each with what is written at its axis.
        """
        self.path, self.trackers, self.curves = run / LOG, trackers, curves
        self.records = [record for record in read(self.path) if record["step"] <= step]
        with _said(self.path), atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())

    def add(self, record: Record) -> None:
        """One more line. Numbers that are not finite become null, which JSON has no other word for."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(finite)
        with _said(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        for tracker in self.trackers:
            tracker(finite)

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after a step is there."""
        return any(
            record["step"] == step and any(name.startswith("eval_") for name in record) for record in self.records
        )

    def draw(self, title: str) -> None:
        """Write the curves."""
        self._draw(CURVE, title, "loss in nats", (("training", "loss"), ("held out", "eval_loss")))
        for name, label in self.curves.items():
            self._draw(f"{name}.svg", title, label, ((name, name),))

    def _draw(self, file_name: str, title: str, label: str, named: Iterable[tuple[str, str]]) -> None:
        series = [_series(name, key, self.records) for name, key in named]
        svg = line_plot([one for one in series if one.points], title=title, x_label="steps", y_label=label)
        with _said(self.path.parent / file_name), atomic_write(self.path.parent / file_name) as file:
            file.write(svg.encode())


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """What the file system refuses, as an error with a hint."""
    try:
        yield
    except OSError as error:
        hint = "free some space and start the same command again: it goes on from the last checkpoint"
        raise MissingResource(f"{path} was not written", error.strerror or str(error), hint) from None


def read(path: Path) -> list[Record]:
    """The records of a log, without a last line that a killed process left unfinished."""
    records: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def trackers(names: tuple[str, ...], run: Path, settings: Mapping[str, Any]) -> Callable[[int], tuple[Tracker, ...]]:
    """What starts, after so many steps, functions that hand records to TensorBoard, wandb or trackio.

    They are started when the run's folder is known to be the run's, since some write into it. Raises `MissingResource`
    at once for one that is not installed, and on starting for one that refuses, as wandb does without a key.
    """
    for name in names:
        _module(name)

    def start(step: int) -> tuple[Tracker, ...]:
        return tuple(_started(name, run, settings, step) for name in names)

    return start


def _started(name: str, run: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    try:
        return TRACKERS[name](run, settings, step)
    except MissingResource:
        raise
    except Exception as error:  # of classes that only the library knows
        raise MissingResource(
            f"{name} could not be started",
            str(error) or type(error).__name__,
            "do what it says, or leave --track out: log.jsonl is written in any case",
        ) from None


def _tensorboard(run: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    # What was logged after this step is about to happen again.
    writer = _module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def track(record: Record) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return track


def _hosted(library: str) -> Start:
    """wandb, and trackio, which took over its interface."""

    def start(run: Path, settings: Mapping[str, Any], step: int) -> Tracker:
        module = _module(library)
        module.init(project="cabochon", name=run.name, config=dict(settings))
        return lambda record: module.log(_numbers(record), step=record["step"])

    return start


TRACKERS: dict[str, Start] = {
    "tensorboard": _tensorboard,
    "wandb": _hosted("wandb"),
    "trackio": _hosted("trackio"),
}


def _numbers(record: Record) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = (error.name or name).partition(".")[0]
        raise MissingResource(
            f"{library} is not installed",
            "--track asks for it, and it does not come with cabochon",
            f"pip install {library}, or leave --track out: log.jsonl is written in any case",
        ) from None


def _series(name: str, key: str, records: list[Record]) -> Series:
    points = [(r["step"], r[key], f"{r[key]:.3g}") for r in records if isinstance(r.get(key), float)]
    return Series(name, points)
